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
    Notebook,
    name_of,
    read_record,
    submit_version,
    username,
)
from common.kaggle.submit import refuse_nowhere
from common.run import Run

RUN_FILES = ("config.json", "run.json", "result.json", "fold-*/model.pt", "fold-*/fold.json")

# It uses one GPU even where there are two. Rows that are not predicted shortly before the limit get fallback values.
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
    if given.fetch:
        facts = read_record(record, "notebook")
        notebook = Notebook(site, "notebook", facts["kernel"], poll)
    else:
        notebook = Notebook(site, "notebook", f"{username(site)}/{name_of(name, 'predict')}", poll)
        facts = _pushed(competition, given, words, notebook)
        write_json(record, facts)
    flags = "'--fetch --submit'" if given.submit else "--fetch"
    with go_on_with(f"make notebook COMP={name} ARGS={flags}"):
        notebook.follow(WAIT_SECONDS, 0.0 if given.fetch else OUTAGE_SECONDS)
        with tempfile.TemporaryDirectory(prefix="kaggle-notebook-") as place:
            written_there = fetched(site, notebook.reference, "submission.csv", Path(place))
            if written_there is None:
                raise UserError(f"{notebook.page} wrote no submission.csv: see its log")
            _print_difference(written_there, Path(facts["table"]))
        if given.submit:
            submit_version(site, facts, min(poll, 4.0))
        else:
            print(f"to submit this version: make notebook COMP={name} ARGS='--fetch --submit'")


def _pushed(competition: Competition, given: argparse.Namespace, words: Sequence[str], notebook: Notebook) -> dict:
    """Predict here, then push the notebook and the files that it needs; returns the facts that `--fetch` needs."""
    name = competition.name
    chosen = runs.finished(name, given.run)
    if demo := [run.name for run in chosen if run.provenance["demo"]]:
        raise UserError(
            f"{demo[0]} was trained on demo data and means nothing on Kaggle: make data COMP={name}, then make "
            f"train COMP={name}"
        )
    given.run, start = ",".join(run.name for run in chosen), time.monotonic()
    table = predict.predict(competition, given)
    _print_budget(table, time.monotonic() - start, given.limit)
    metadata = {"machine_shape": given.accelerator, "enable_internet": "false"}
    words, margin = ("predict", name, "--run", given.run, *words), min(MARGIN_SECONDS, given.limit / 10)
    with tempfile.TemporaryDirectory(prefix="kaggle-notebook-") as place:
        folder = Path(place)
        files, pins = kit(name, chosen, folder / "wheels")
        version = notebook.push_files(files, folder)
        text = written(PREDICTION, competition.source.slug, words, version, pins, given.limit, margin)
        facts = notebook.push(text, metadata, given.limit, folder)
    print(f"notebook: {notebook.page} version {facts['version']}, for runs {given.run}")
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
    theirs, ours = (file.read_bytes() if file.is_file() else b"" for file in (there, here))
    if theirs == ours:
        print(f"the notebook's submission.csv equals {here}, byte for byte")
        return
    theirs, ours = (content.splitlines()[1:] for content in (theirs, ours))
    same = len(set(ours) & set(theirs))
    print(
        f"the notebook's submission.csv has {len(theirs):,} rows, {same:,} of them as in {here}; machines round "
        f"differently, but most should be the same"
    )
