"""submissions/<competition>/ledger.csv: one row for every submission ever sent, with its status and scores."""

import csv
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from common.errors import UserError
from common.files import locked, read_cell, write_csv
from common.kaggle.client import Site
from common.submission import SUBMISSIONS

LONGEST_MESSAGE = 500  # characters, including the tag
SCORED, FAILED = "COMPLETE", "ERROR"


@dataclass(frozen=True)
class Row:
    """One submission: when and what was sent, its validation score, and Kaggle's status and scores; scores are text."""

    time: str
    file: str
    sha256: str = ""
    run: str = ""
    commit: str = ""
    validation: str = ""
    public: str = ""
    private: str = ""
    status: str = "PENDING"  # until it is SCORED or FAILED
    ref: str = ""  # Kaggle's number of the submission
    reason: str = ""  # why Kaggle could not score it
    message: str = ""

    def listed(self, submissions: "list[Row]") -> "Row | None":
        """This row with the values that Kaggle lists for it, found by `ref` or, without one, by its message's tag."""
        tag = re.search(r"\[kit-[0-9a-f]{12}\]$", self.message)
        for one in submissions:
            if one.ref == self.ref if self.ref else tag and tag.group() in one.message:
                told = ("public", "private", "status", "ref", "reason")
                return replace(self, **{name: getattr(one, name) for name in told})
        return None


COLUMNS = [field.name for field in fields(Row)]


def tagged(message: str) -> str:
    """The message, cut to Kaggle's limit, with a unique tag at its end."""
    tag = f" [kit-{secrets.token_hex(6)}]"
    return message[: LONGEST_MESSAGE - len(tag)] + tag


def submissions(site: Site) -> tuple[list[Row], int | None]:
    """The account's submissions at Kaggle, newest first, and how many are left today (None if unknown)."""
    found = site.asked("submissions")
    return [Row(**row) for row in found["submissions"]], found["left"]


def path_of(competition: str) -> Path:
    return SUBMISSIONS / competition / "ledger.csv"


def read(competition: str) -> list[Row]:
    """All rows, oldest first, without columns that were added by hand.

    Raises UserError for cells that cannot be read: their submissions would be sent again.
    """
    path = path_of(competition)
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream)
            if absent := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
                raise ValueError(f"no column {', '.join(absent)}")
            rows = [Row(**{name: read_cell(row.get(name) or "") for name in COLUMNS}) for row in table]
        for row in rows:
            if row.time or not row.ref:
                datetime.fromisoformat(row.time)
            float(row.validation or 0)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): mend it, or move it away to start a new one") from error
    return rows


def newest(rows: list[Row], column: str, like: Row) -> Row | None:
    """The last row with the same value in `column` (say sha256) as `like`; None without one, or if `column` is ""."""
    return next((row for row in reversed(rows) if column and getattr(row, column) == getattr(like, column)), None)


@contextmanager
def changing(competition: str) -> Iterator[list[Row]]:
    """All rows, for one process at a time to change in place; they are written if nothing was raised."""
    path = path_of(competition)
    with locked(path.with_name(".ledger.lock")):  # not the ledger itself, which is replaced at every write
        rows = read(competition)
        yield rows
        if rows or path.is_file():
            write_csv(path, COLUMNS, map(astuple, rows))


def claim(competition: str, row: Row, column: str = "") -> Row | None:
    """Append the row before it is sent, or return the newest row that already has the same value in `column`.

    So a killed command leaves a trace, and of two commands at the same time only one sends.
    """
    with changing(competition) as rows:
        if (before := newest(rows, column, row)) is None:
            rows.append(row)
    return before


def put(competition: str, row: Row, remove: bool = False) -> None:
    """Replace the claim by `row`, or remove the claim if nothing was sent."""
    with changing(competition) as rows:
        rows[:] = [*(other for other in rows if other.message != row.message), *([] if remove else [row])]
