"""All runs of a competition side by side, and which of them is the best: for `make runs` and `make submit`.

Scores are compared on common rows only. A run that held out every fold is preferred to one that held out a single one:
its score is over more rows, and its submission is the mean of more models.
"""

import fcntl
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from common import run as runs
from common.competition import Competition
from common.config import MACHINE_FIELDS, Config
from common.errors import UserError
from common.files import TEXTS, not_read, number_in, read_json, read_table, write_csv
from common.flags import to_json
from common.kaggle import ledger
from common.report import Report, subplots, with_error
from common.run import Run

CLEARLY = 2.0  # standard errors by which a run with fewer rows must be better
SHOWN = 60  # characters of the settings on the terminal
# Columns that a terminal has room for.
TERMINAL = ("run", "state", "score", "error", "std", "rows", "folds", "public", "seconds", "memory_gib", "settings")


@dataclass(frozen=True)
class Line:
    """A run in the table; None where it has no such figure."""

    run: str
    state: str  # finished, "not submitted", stopped, training or damaged
    score: float | None = None
    error: float | None = None  # standard error of the score
    mean: float | None = None  # over folds
    std: float | None = None
    rows: int | None = None  # in the score
    folds: str = ""  # "all" when every fold is held out once, else the number of held-out folds
    public: float | None = None  # of the leaderboard
    private: float | None = None
    seconds: float | None = None  # of training
    per_second: float | None = None  # samples per second, the mean over epochs
    memory_gib: float | None = None  # the largest over folds
    settings: str = ""  # recipe, and what differs from it
    created: str = ""


COLUMNS = [field.name for field in fields(Line)]


def lines(
    competition: str, recipes: Mapping[str, Config], higher_is_better: bool, broken: dict[str, UserError] | None = None
) -> list[Line]:
    """A line for every run: the best score first, then those without one, the newest first.

    Raises UserError for a run with a damaged file or, if `broken` is given, adds the error to it by the run's name.
    """
    boards, found = _boards(competition), []
    for run in reversed(runs.all_runs(competition, broken)):
        try:
            found.append(_line(run, recipes, boards.get(run.name, {})))
        except UserError as error:
            if broken is None:
                raise
            broken[run.name] = error
    found += [Line(name, "damaged") for name in sorted(broken or ())]
    sign = -1 if higher_is_better else 1
    return sorted(found, key=lambda line: (line.score is None, sign * (line.score or 0.0)))


def _line(run: Run, recipes: Mapping[str, Config], board: dict[str, float | None]) -> Line:
    line = Line(run.name, _state(run), settings=_settings(run, recipes), created=run.provenance["created"], **board)
    result = run.result
    if result is None:
        return line
    return replace(
        line,
        score=score_of(result),
        error=_error_of(result),
        mean=result.get("mean"),
        std=result.get("std"),
        rows=result.get("rows") or None,
        folds="all" if is_complete(run, result) else str(len(result.get("fold_scores", ()))),
        seconds=result.get("training_seconds"),
        per_second=_samples_per_second(run.path / "metrics.csv"),
        memory_gib=max((fold["memory_gib"] for fold in result.get("folds", ()) if "memory_gib" in fold), default=None),
    )


def _state(run: Run) -> str:
    if run.is_finished:
        return "finished"
    try:
        with open(run.path / "lock") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "training"
    except OSError:  # no lock was ever taken, or none can be
        pass
    return "stopped" if run.result is None else "not submitted"


def score_of(result: dict[str, Any]) -> float | None:
    """The score of a run's result or of a submission's provenance; None where there is none, or it is not finite."""
    score = result.get("score")
    return score if isinstance(score, (int, float)) and math.isfinite(score) else None


def _error_of(result: dict[str, Any]) -> float | None:
    return result.get("errors", {}).get(result["monitor"])


def _settings(run: Run, recipes: Mapping[str, Config]) -> str:
    """The recipe, and the settings in which the run differs from it, except those of the machine."""
    recipe = run.provenance["recipe"]
    if run.is_blend:
        told = read_json(run.path / "blend.json", "by", "space", "members", rules={"members": TEXTS})
        return f"blend: {told['by']}, {told['space']}, {', '.join(told['members'])}"
    if recipe not in recipes:
        return f"{recipe} (recipe no longer exists)"
    values, usual = read_json(run.path / "config.json"), json.loads(to_json(recipes[recipe]))
    changed = [
        f"{name} {value}"
        for name, value in values.items()
        if name not in MACHINE_FIELDS and (name not in usual or usual[name] != value)
    ]
    return f"{recipe}{': ' * bool(changed)}{', '.join(changed)}"


def _samples_per_second(table: Path) -> float | None:
    if not table.is_file():
        return None
    try:
        speeds = [float(row["samples_per_second"]) for row in read_table(table) if row.get("samples_per_second")]
    except ValueError as error:
        raise not_read(table, error, "delete it, the table of runs does without it") from error
    return round(sum(speeds) / len(speeds), 1) if speeds else None


def _boards(competition: str) -> dict[str, dict[str, float | None]]:
    """The newest leaderboard scores of every run that was sent."""
    known = {}
    for row in ledger.read(competition):
        public, private = number_in(row.public), number_in(row.private)
        if row.run and (public, private) != (None, None):
            known[row.run] = {"public": public, "private": private}
    return known


def is_complete(run: Run, result: dict[str, Any]) -> bool:
    """Whether every fold was held out once."""
    held = set(result.get("fold_scores", ()))
    return bool(held) and (read_json(run.path / "config.json").get("fold") == "all" or held >= _folds_of(run))


_known_folds: dict[str, set[str]] = {}  # by fingerprint: many runs have the same, and the file may be long


def _folds_of(run: Run) -> set[str]:
    split = run.provenance["folds_fingerprint"]
    if split not in _known_folds:
        _known_folds[split] = {row["fold"] for row in read_table(run.path / "folds.csv", "fold")} - {"-1"}
    return _known_folds[split]


@dataclass(frozen=True)
class _Scored:
    """A run with a score, as `best_run` compares it."""

    name: str
    score: float
    error: float | None
    rows: int
    complete: bool
    folds: str  # fingerprint
    by_fold: dict[str, float]


def _scored(run: Run) -> _Scored | None:
    result = run.result
    if result is None or (score := score_of(result)) is None:
        return None
    by_fold = {fold: value for fold, value in result.get("fold_scores", {}).items() if math.isfinite(value)}
    complete, folds = is_complete(run, result), run.provenance["folds_fingerprint"]
    return _Scored(run.name, score, _error_of(result), result.get("rows", 0), complete, folds, by_fold)


def best_run(competition: str, names: Iterable[str], higher_is_better: bool) -> tuple[str, str] | None:
    """The best of the runs `names`, and why in a sentence; None if none of them exists and has a score.

    Among runs that hold out every fold, of data no smaller than those of the others, the score decides. A run with
    fewer rows takes their place only if it is better by CLEARLY on the folds that both have held out; folds of
    different splits cannot be compared.
    """
    sign = 1 if higher_is_better else -1
    broken: dict[str, UserError] = {}
    there, names = {run.name: run for run in runs.all_runs(competition, broken)}, dict.fromkeys(names)
    for name in broken.keys() & names:
        raise broken[name]
    found = [one for name in names if name in there and (one := _scored(there[name]))]
    if not found:
        return None
    most = max((one.rows for one in found if not one.complete), default=0)  # all folds of a part of the data are fewer
    found = [replace(one, complete=one.complete and one.rows >= most) for one in found]
    found.sort(key=lambda one: (one.complete, one.rows if not one.complete else 0, sign * one.score), reverse=True)
    best, notes = found[0], []
    for other in found[1:]:
        if other.complete:  # every fold as well, and not better
            if other.rows != best.rows:
                told = f"{other.name} has {with_error(other.score, other.error)} on {other.rows:,} rows"
                notes.append(f"{told}, so the two scores are not on the same rows")
            continue
        if sign * other.score <= sign * best.score and (best.complete or _common_folds(other, best)):
            continue  # fewer rows, and not even better on those
        better, note = _beats(other, best, sign)
        notes.append(note)
        best = other if better else best
    why = f"{best.name}: CV {with_error(best.score, best.error)} on {best.rows:,} rows"
    why += f", the best of {len(found)} runs" if len(found) > 1 else ", the only run with a score"
    return best.name, "; ".join([why, *notes[-3:]])


def _beats(fewer: _Scored, more: _Scored, sign: int) -> tuple[bool, str]:
    """Whether a run with fewer rows is clearly better on the rows that both have, and the note that says so."""
    common = _common_folds(fewer, more)
    told = f"{fewer.name} has {with_error(fewer.score, fewer.error)}, but on {fewer.rows:,} rows only"
    if not common:
        apart = "in other folds than those of" if fewer.folds != more.folds else "and none in common with"
        return False, f"{told}, {apart} {more.name}"
    ours, theirs = (sum(run.by_fold[fold] for fold in common) / len(common) for run in (fewer, more))
    rows = f"on common rows (fold {', '.join(common)}) it has {ours:.5f} and {more.name} {theirs:.5f}"
    if fewer.error is None or more.error is None:
        return False, f"{told}; {rows}, without a standard error"
    # The error for independent rows; on the same rows that of the difference is smaller.
    apart = math.sqrt(2) * fewer.error * math.sqrt(max(1.0, len(fewer.by_fold) / len(common)))
    better = sign * (ours - theirs) > CLEARLY * apart
    return better, f"{told}; {rows}, {'' if better else 'not '}better by {CLEARLY:g} standard errors"


def _common_folds(one: _Scored, other: _Scored) -> list[str]:
    return sorted(set(one.by_fold) & set(other.by_fold)) if one.folds == other.folds else []


def show(competition: Competition) -> None:
    """`make runs`: the table on the terminal, as runs/<competition>/runs.csv and as the page runs.html.

    Raises UserError at the end if there are damaged runs, which have a line without figures.
    """
    name, broken = competition.name, {}
    found = lines(name, competition.recipes, competition.source.higher_is_better, broken)
    if not found:
        raise UserError(f"there are no runs of {name} yet: make train COMP={name}")
    home = runs.RUNS / name
    table = [["" if cell is None else cell for cell in astuple(line)] for line in found]
    write_csv(home / "runs.csv", COLUMNS, table)
    whole = [run for run in runs.all_runs(name, {}) if run.name not in broken]
    real = [run for run in whole if not run.provenance["demo"]]
    best = best_run(name, [run.name for run in real or whole], competition.source.higher_is_better)
    print(_as_text(found))
    page = _page(name, found, table, best)
    print(best[1] if best else "no run has a score")
    print(f"runs: {page} and {home / 'runs.csv'}")
    if broken:
        raise UserError("; ".join(map(str, broken.values())))


def _as_text(found: list[Line]) -> str:
    """The columns of TERMINAL, without those that are empty."""
    columns = []
    for name in TERMINAL:
        cells = [_cell(getattr(line, name))[:SHOWN] for line in found]
        if any(cells):
            width = max(map(len, [name, *cells]))
            align = str.ljust if name in ("run", "state", "settings") else str.rjust
            columns.append([align(cell, width) for cell in [name, *cells]])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _page(name: str, found: list[Line], table: list[list[Any]], best: tuple[str, str] | None) -> Path:
    page = Report(runs.RUNS / name, f"{name}: {len(found)} runs")
    if best:
        page.text(best[1])
    scored = sorted((line for line in found if line.score is not None), key=lambda line: line.created)
    if scored:
        figure, axes = subplots(11, 4)
        for complete, mark, label in ((True, "o", "every fold held out"), (False, ".", "some folds only")):
            places = [n for n, line in enumerate(scored) if (line.folds == "all") == complete]
            if places:
                scores, errors = [scored[n].score for n in places], [scored[n].error or 0.0 for n in places]
                axes.errorbar(places, scores, errors, fmt=mark, lw=1, label=label)
        if places := [n for n, line in enumerate(scored) if line.public is not None]:
            axes.plot(places, [scored[n].public for n in places], "x", label="public leaderboard")
        axes.set(ylabel="score", xlabel="runs, the oldest first")
        if len(scored) <= 40:
            axes.set_xticks(range(len(scored)), [line.run for line in scored], rotation=60, ha="right", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        page.figure(figure, "runs", "Scores with one standard error")
    page.table(COLUMNS, table)
    return page.write("runs.html")
