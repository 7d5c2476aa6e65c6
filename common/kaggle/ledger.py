"""submissions/<competition>/ledger.csv: a line for everything that was ever sent, with what became of it."""

import csv
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from common.errors import UserError
from common.files import not_written, read_cell, write_csv
from common.kaggle.status import Submission
from common.submission import SUBMISSIONS


@dataclass(frozen=True)
class Row:
    """One submission: when and what was sent, what validation promised and what Kaggle said."""

    time: str
    file: str
    sha256: str = ""
    run: str = ""
    commit: str = ""
    validation: str = ""
    public: str = ""
    private: str = ""
    status: str = "PENDING"
    ref: str = ""  # Kaggle's number of the submission
    reason: str = ""  # why Kaggle could not score it
    message: str = ""  # tells which of Kaggle's submissions a row without a number is

    def with_answer(self, submission: Submission) -> "Row":
        return replace(
            self,
            public=submission.public,
            private=submission.private,
            status=submission.status,
            ref=submission.ref,
            reason=submission.reason,
        )


COLUMNS = [field.name for field in fields(Row)]


def path_of(competition: str) -> Path:
    return SUBMISSIONS / competition / "ledger.csv"


def read(competition: str) -> list[Row]:
    """All lines, oldest first; columns that were added by hand are left out.

    Raises UserError for what a spreadsheet may have made of it (another separator, dates and numbers of its own): rows
    that are not understood would be lost, and their files sent again.
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


def newest(rows: list[Row], column: str, value: str) -> Row | None:
    """The last line that has `value` there, say the sha256 of a file."""
    return next((row for row in reversed(rows) if getattr(row, column) == value), None)


@contextmanager
def changing(competition: str) -> Iterator[list[Row]]:
    """All lines, to be changed in place by one process at a time; written when nothing was raised.

    Raises UserError when they cannot be read or written.
    """
    path = path_of(competition)
    lock = path.with_name(".ledger.lock")  # not the ledger itself, which every writing replaces
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock, "w")
    except OSError as error:
        raise not_written(lock, error) from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        rows = read(competition)
        yield rows
        if rows or path.is_file():
            write_csv(path, COLUMNS, map(astuple, rows))


def claim(competition: str, row: Row, column: str = "") -> Row | None:
    """Append what is about to be sent: a kill on the way cannot hide it, and of two commands at once only one sends it.

    Where a line has the same `column` already, nothing is appended and the newest such line is returned.
    """
    with changing(competition) as rows:
        before = newest(rows, column, getattr(row, column)) if column else None
        if before is None:
            rows.append(row)
    return before


def put(competition: str, row: Row) -> None:
    """Append the row, or let it take the place of the one with its number or of itself from before it had one."""
    with changing(competition) as rows:
        rows[:] = [*(other for other in rows if not _is_same(other, row)), row]


def remove(competition: str, row: Row) -> None:
    """Take back a claim: nothing was sent."""
    with changing(competition) as rows:
        rows[:] = [other for other in rows if not _is_same(other, row)]


def _is_same(other: Row, row: Row) -> bool:
    return other.ref == row.ref if other.ref else (other.time, other.file) == (row.time, row.file)
