"""submissions/<competition>/ledger.csv: a line for everything that was ever sent, with what became of it."""

import csv
import io
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from common.errors import UserError
from common.files import write_text
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
            rows = [Row(**{name: row.get(name) or "" for name in COLUMNS}) for row in table]
        for row in rows:
            if row.time or not row.ref:
                datetime.fromisoformat(row.time)
            float(row.validation or 0)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): mend it, or move it away to start a new one") from error
    return rows


def write(competition: str, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path_of(competition), text.getvalue())


def put(competition: str, row: Row) -> None:
    """Append the row, or let it take the place of the one with its number or of itself from before it had one."""
    rows = [
        other
        for other in read(competition)
        if (other.ref != row.ref if other.ref else (other.time, other.file) != (row.time, row.file))
    ]
    write(competition, [*rows, row])
