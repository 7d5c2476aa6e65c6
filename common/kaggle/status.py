"""What Kaggle knows of the account's submissions, and of the leaderboard."""

import csv
import io
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.kaggle.client import asked, explained, kaggle
from common.kaggle.credentials import Account
from common.kaggle.source import Source

SCORED, FAILED = "COMPLETE", "ERROR"


@dataclass(frozen=True)
class Submission:
    """A submission as Kaggle lists it; scores are text, empty until there are some."""

    ref: str
    date: str
    file: str
    message: str
    status: str  # PENDING, COMPLETE or ERROR
    public: str
    private: str
    reason: str  # why Kaggle could not score it


def submissions(account: Account, source: Source) -> tuple[list[Submission], int | None]:
    """The account's submissions, newest first, and how many are left today (None: Kaggle does not say)."""
    found = asked(account, source, "submissions")
    return [Submission(**row) for row in found["submissions"]], found["left"]


def leaderboard(account: Account, source: Source) -> list[float]:
    """Public scores of all teams; raises UserError where the leaderboard is not public or cannot be read."""
    what = f"reading the leaderboard of {source.slug}"
    with tempfile.TemporaryDirectory() as folder:
        answer = kaggle(account, "competitions", "leaderboard", source.slug, "-d", "-p", folder)
        if answer.status != 0:
            raise explained(answer, account, source, what)
        try:
            with zipfile.ZipFile(next(Path(folder).glob("*.zip"))) as archive:
                text = archive.read(archive.namelist()[0]).decode("utf-8-sig")
            rows = csv.DictReader(io.StringIO(text))
            return [float(row["Score"]) for row in rows if row.get("Score")]
        except (OSError, ValueError, KeyError, IndexError, StopIteration, zipfile.BadZipFile) as error:
            raise UserError(f"{what}: it cannot be read ({error}): see {source.page}/leaderboard") from error


def rank(score: str, scores: list[float], higher_is_better: bool) -> int | None:
    """Place of a public score among all teams: one more than there are better ones."""
    try:
        own = float(score)
    except ValueError:
        return None
    return 1 + sum(other > own if higher_is_better else other < own for other in scores)
