"""`make board`: validation against leaderboard scores of all submissions, as a table and a plot."""

import tempfile
import zipfile
from pathlib import Path

from common.errors import UserError
from common.files import number_in, write_with
from common.kaggle import ledger
from common.kaggle.client import Site
from common.kaggle.credentials import find
from common.kaggle.ledger import Row
from common.kaggle.source import Source
from common.kaggle.submit import refuse_nowhere
from common.submission import SUBMISSIONS


def board(competition: str, source: Source) -> None:
    """Refresh the ledger from Kaggle, print it with ranks and draw board.png.

    If Kaggle fails, the ledger as it was is printed and drawn first; then UserError is raised.
    """
    refuse_nowhere(competition, source)
    rows, failure, scores = ledger.read(competition), None, []
    try:
        site = Site(competition, source, find())
        submissions = ledger.submissions(site)[0]
        with ledger.changing(competition) as rows:  # read again: a submission may have been added meanwhile
            rows[:] = refreshed(rows, submissions)
        try:
            scores = leaderboard(site)
        except UserError as error:
            print(f"no ranks are shown: {error}")
    except UserError as error:
        failure = error
    if rows:
        print(table(rows, scores, source))
        path = SUBMISSIONS / competition / "board.png"
        draw(rows, source, path)
        print(f"plot: {path}")
    elif failure is None:
        print(f"nothing was submitted to {source.page} yet: make submit COMP={competition}")
    if failure:
        raise UserError(f"scores not refreshed: {failure}")


def refreshed(rows: list[Row], submissions: list[Row]) -> list[Row]:
    """The rows with Kaggle's newest scores, plus a row for every submission that was not sent from this machine."""
    found = [row.listed(submissions) or row for row in rows]
    refs = {row.ref for row in found}
    return sorted([*found, *(one for one in submissions if one.ref not in refs)], key=lambda row: row.time)


def leaderboard(site: Site) -> list[float]:
    """Public scores of all teams; raises UserError if the leaderboard is not public or cannot be read."""
    import pandas as pd

    source, what = site.source, f"reading the leaderboard of {site.source.slug}"
    with tempfile.TemporaryDirectory() as folder:
        site.told(what, "competitions", "leaderboard", source.slug, "-d", "-p", folder)
        try:
            scores = pd.read_csv(next(Path(folder).glob("*.zip")), usecols=["Score"], index_col=False)["Score"]
            return scores.dropna().astype(float).tolist()
        except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
            raise UserError(f"{what}: it cannot be read ({error}): see {source.page}/leaderboard") from error


def rank(score: str, scores: list[float], higher_is_better: bool) -> int | None:
    """Rank of a public score among all teams: one more than the number of better scores."""
    if (own := number_in(score)) is None:
        return None
    return 1 + sum(other > own if higher_is_better else other < own for other in scores)


def table(rows: list[Row], scores: list[float], source: Source) -> str:
    """Rows as aligned text, with the rank of the public score on today's leaderboard."""
    lines = [("time", "run", "validation", "public", "private", "rank", "status")]
    for row in rows:
        place = rank(row.public, scores, source.higher_is_better) if scores else None
        validation = f"{float(row.validation):.5f}" if row.validation else ""
        cells = (row.time[:16].replace("T", " "), row.run or Path(row.file).name, validation, row.public, row.private)
        cells += (f"{place} of {len(scores)}" if place else "", row.status + (row.reason and f": {row.reason}"))
        lines.append(tuple(cell or "-" for cell in cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def draw(rows: list[Row], source: Source, path: Path) -> None:
    """Plot a point per submission with a validation score; on the diagonal validation and leaderboard agree."""
    from common.report import subplots, without_markup

    figure, axes = subplots(7, 6)
    for name, marker in (("public", "o"), ("private", "s")):
        points = [(row.run, number_in(row.validation), number_in(getattr(row, name))) for row in rows]
        points = [(run, x, y) for run, x, y in points if x is not None and y is not None]
        if not points:
            continue
        axes.scatter([x for _, x, _ in points], [y for _, _, y in points], marker=marker, label=name)
        for run, x, y in points:  # matplotlib would take a $ in a run's name for a formula
            axes.annotate(run, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7, parse_math=False)
    if axes.collections:
        low, high = (pick(*axes.get_xlim(), *axes.get_ylim()) for pick in (min, max))
        axes.plot([low, high], [low, high], color="0.7", linewidth=1, zorder=0, label="equal")
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no submission has both scores yet", ha="center", transform=axes.transAxes)
    axes.set(xlabel="validation", ylabel="leaderboard", title=source.slug)
    without_markup(figure)
    write_with(path, lambda stream: figure.savefig(stream, format="png", dpi=120))
