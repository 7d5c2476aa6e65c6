"""Fetch a Kaggle notebook's runs and submissions into the folders of the local ones, and the end of its log."""

import json
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from common import archive
from common import run as runs
from common.errors import UserError
from common.files import write_json
from common.kaggle.client import Site, kaggle
from common.kaggle.kernel.notebook import OUTPUT, STATE
from common.submission import SUBMISSIONS, sidecar

FOLLOWS = "ended with status"  # the notebook's own error after the program that it started has logged the reason


def fetched(site: Site, reference: str, name: str, folder: Path) -> Path | None:
    """Download the file `name` of the notebook's output into `folder`; None if there is no such file."""
    # The pattern also excludes names with ../, which the kaggle program would follow.
    more = ("-p", str(folder), "--file-pattern", f"^{re.escape(name)}$")
    site.told(f"fetching the output of {reference}", "kernels", "output", reference, *more)
    return folder / name if (folder / name).is_file() else None


def unfinished(site: Site, reference: str) -> str:
    """sha256 of the checkpoint if the end of the session stopped the run, or "" if the run is finished."""
    with tempfile.TemporaryDirectory(prefix="kaggle-output-") as folder:
        state = fetched(site, reference, STATE, Path(folder))
        try:
            return str(json.loads(state.read_text())["checkpoint"]) if state else ""
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{STATE} of {reference} cannot be read ({error}): repeat the same command") from error


def fetch_output(site: Site, reference: str) -> Path:
    """Put the notebook's run and submission into the folders of the local ones; returns the CSV."""
    with tempfile.TemporaryDirectory(prefix="kaggle-output-") as name:
        folder = Path(name)
        packed = fetched(site, reference, OUTPUT, folder / "raw")
        if packed is None:
            raise UserError(
                f"{reference} has no {OUTPUT} among its outputs: see https://www.kaggle.com/code/{reference}"
            )
        try:
            archive.unpack(packed, folder / "output")
        except archive.Damaged as error:  # the kaggle program may save an error page as the file
            raise UserError(f"{reference}: {error}: repeat the same command") from error
        table = _place(folder / "output", site.competition)
    print(f"submission: {table}")
    return table


def _place(output: Path, competition: str) -> Path:
    """Move the run and its submission in; a name already in use gets -kaggle, -kaggle2 ... so nothing is replaced."""
    table = next((output / "submissions" / competition).glob("*.csv"), None)
    if table is None:
        raise UserError(f"the notebook's output holds no submission of {competition}")
    provenance = sidecar(table)
    old = provenance.get("run", table.stem)
    name = _free_name(old, competition)
    run, home = output / "runs" / competition / old, runs.RUNS / competition / name
    target = SUBMISSIONS / competition / f"{table.stem.replace(old, name)}.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    if run.is_dir():
        shutil.move(run, home)
        print(f"run: {home}")
    if provenance:
        write_json(target.with_suffix(".json"), provenance | {"run": name})
    shutil.move(table, target)
    return target


def _free_name(name: str, competition: str) -> str:
    tried, number = name, 1
    while (runs.RUNS / competition / tried).exists() or (SUBMISSIONS / competition / f"{tried}.csv").exists():
        tried, number = f"{name}-kaggle{number if number > 1 else ''}", number + 1
    return tried


def end_of_log(site: Site, reference: str) -> str:
    """The reason why the notebook ended, from its log (JSON at Kaggle); "no log" if it cannot be read.

    It is the last error of the kit, or else of another program, but not the tracebacks of torchrun and of the notebook
    that follow it. Without such an error it is the last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        with suppress(UserError):  # the notebook's failure matters more than a failure to fetch its log
            kaggle(site.account, "kernels", "output", reference, "-p", folder, "--file-pattern", "^$")
        text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in Path(folder).glob("*.log"))
    with suppress(ValueError, KeyError, TypeError):  # not JSON, or cut: keep it as plain text
        text = "".join(part["data"] for part in json.loads(text))
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() if line.strip()]
    reasons = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception): ", line)]
    told = [line for line in reasons if line.startswith("error: ")] or [one for one in reasons if FOLLOWS not in one]
    return told[-1][:300] if told else " | ".join(lines[-3:])[-300:] or "no log"
