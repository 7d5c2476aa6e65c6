"""`make notebook`: predict the test set that Kaggle mounts, without internet, with runs trained on this machine."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import predict
from common import run as runs
from common.competition import Competition
from common.errors import UserError
from common.files import read_table, write_json
from common.kaggle.client import Site, go_on_with
from common.kaggle.kernel.notebook import MARGIN_SECONDS, START, code, needed, wheels, written
from common.kaggle.kernel.output import fetched
from common.kaggle.kernel.push import (
    OUTAGE_SECONDS,
    WAIT_SECONDS,
    follow_notebook,
    name_of,
    push_files,
    push_notebook,
    read_record,
    submit_version,
    username,
)
from common.kaggle.submit import refuse_nowhere
from common.run import Run

RUN_FILES = ("config.json", "run.json", "result.json", "fold-*/model.pt", "fold-*/fold.json")

PREDICTION = (
    START
    + """
# %% Predict the mounted test set, with the same command as at home. Its sample submission decides the rows.
command = [sys.executable, "-m", "common", {words}, "--data", str(data)]
left = max(1.0, END - time.monotonic())
command += ["--fallback", "--budget", str(left)]
offline = {{"HF_HUB_OFFLINE": "1"}}
status = subprocess.run(command, cwd=KIT, env=environment | offline, timeout=left + {margin}).returncode
assert status == 0, f"the prediction ended with status {{status}}"
(table,) = (KIT / "submissions").glob("*/*.csv")
shutil.copyfile(table, WORKING / "submission.csv")
shutil.copyfile(table.with_suffix(".json"), WORKING / "submission.json")  # lists the rows with fallback values
print(f"submission.csv after {{time.monotonic() - END + {seconds}:,.0f}} s")
"""
)


def kit(competition: str, chosen: Sequence[Run], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files that the notebook needs (code, runs, wheels) by name, and the wheels' pins by import name.

    The wheels are downloaded into the new `folder`. Raises UserError for a run without weights.
    """
    files = code(competition)
    pins = needed(files)
    for run in chosen:
        found = [file for pattern in RUN_FILES for file in sorted(run.path.glob(pattern))]
        if not any(file.name == "model.pt" for file in found):
            raise UserError(
                f"{run.path} has no saved weights, so it cannot predict the test set that Kaggle mounts: name a run "
                f"of a network with RUN="
            )
        files |= {f"runs/{competition}/{run.name}/{file.relative_to(run.path)}": file for file in found}
    return files | wheels(pins.values(), folder), pins


def publish(competition: Competition, given: argparse.Namespace, words: Sequence[str], poll: float = 15.0) -> None:
    """Predict here, push the notebook with its runs, code and wheels, wait for it, compare its file, submit if asked.

    `given` has the flags of `make notebook`, `words` the flags of its predict command. Raises UserError if any step
    fails.
    """
    name, source = competition.name, competition.source
    if not source.slug:
        raise UserError(f"{name} is not on Kaggle, so no notebook there can predict for it: make predict COMP={name}")
    if given.submit:
        refuse_nowhere(name, source)
    record, site = runs.RUNS / name / "notebook.json", Site.announced(name, source)
    if given.fetch and not record.is_file():
        raise UserError(f"--fetch: no such notebook of {name} was pushed from here: make notebook COMP={name}")
    facts = read_record(record) if given.fetch else _pushed(competition, given, words, site, poll)
    write_json(record, facts)
    flags = "'--fetch --submit'" if given.submit else "--fetch"
    with go_on_with(f"make notebook COMP={name} ARGS={flags}"):
        outage = 0.0 if given.fetch else OUTAGE_SECONDS
        follow_notebook(site, facts["kernel"], WAIT_SECONDS, poll, outage, "notebook")
        with tempfile.TemporaryDirectory(prefix="kaggle-notebook-") as place:
            written_there = fetched(site, facts["kernel"], "submission.csv", Path(place))
            if written_there is None:
                raise UserError(f"https://www.kaggle.com/code/{facts['kernel']} wrote no submission.csv: see its log")
            _print_difference(written_there, Path(facts["table"]))
        if given.submit:
            submit_version(site, facts, Path(facts["table"]), min(poll, 4.0))
        else:
            print(f"to submit this version: make notebook COMP={name} ARGS='--fetch --submit'")


def _pushed(competition: Competition, given: argparse.Namespace, words: Sequence[str], site: Site, poll: float) -> dict:
    """Predict here, then push the notebook and the files that it needs; returns the facts that `--fetch` needs."""
    name, source = competition.name, competition.source
    chosen = runs.finished(name, given.run)
    if demo := [run.name for run in chosen if run.provenance["demo"]]:
        raise UserError(
            f"{demo[0]} was trained on demo data and means nothing on Kaggle: make data COMP={name}, then make "
            f"train COMP={name}"
        )
    given.run, start = ",".join(run.name for run in chosen), time.monotonic()
    table = predict.predict(competition, given)
    _print_budget(table, time.monotonic() - start, given.limit)
    reference = f"{username(site)}/{name_of(name, 'predict')}"
    metadata = {"machine_shape": given.accelerator, "enable_gpu": "true", "enable_internet": "false"}
    with tempfile.TemporaryDirectory(prefix="kaggle-notebook-") as place:
        folder = Path(place)
        files, pins = kit(name, chosen, folder / "wheels")
        version = push_files(site, reference, files, folder, poll)
        words = ("predict", name, "--run", given.run, *words)
        margin = min(MARGIN_SECONDS, given.limit / 10)
        text = written(PREDICTION, source.slug, words, version, pins, given.limit, margin)
        facts = push_notebook(site, reference, text, metadata, given.limit, folder, "notebook")
    print(f"notebook: https://www.kaggle.com/code/{reference} version {facts['version']}, for runs {given.run}")
    return facts | {"code": version, "table": str(table), "pushed": runs.now()}


def _print_budget(table: Path, seconds: float, limit: float) -> None:
    """Print how many rows can be predicted within the limit (seconds) at the speed of this machine.

    Raises UserError if a GPU here takes longer than the limit. A CPU's time only gives a note, as Kaggle's GPUs are
    much faster.
    """
    import torch

    rows = sum(1 for _ in read_table(table))
    each = seconds / max(rows, 1)
    print(
        f"time: {rows:,} rows took {seconds:,.1f} s here ({each:.4f} s each, {runs.machine()}); within "
        f"{limit / 3600:g} h there is time for {limit / each:,.0f} rows at this speed"
    )
    if seconds > limit:
        slow = (
            f"the public test set alone takes {seconds:,.0f} s here, and the limit is {limit:,.0f} s: use fewer "
            f"runs or folds, --tta no, or a longer --limit"
        )
        if torch.cuda.is_available():
            raise UserError(slow)
        print(f"note: {slow}. Kaggle's card is faster than this CPU; rows not predicted in time get fallback values")


def _print_difference(there: Path, here: Path) -> None:
    """Print whether the notebook's file equals the one written on this machine."""
    if there.read_bytes() == (here.read_bytes() if here.is_file() else None):
        print(f"the notebook's submission.csv equals {here}, byte for byte")
        return
    ours, theirs = (file.read_text(encoding="utf-8").splitlines() if file.is_file() else [] for file in (here, there))
    same = len(set(ours[1:]) & set(theirs[1:]))
    print(
        f"the notebook's submission.csv has {len(theirs) - 1:,} rows, {same:,} of them as in {here}; machines round "
        f"differently, but most should be the same"
    )
