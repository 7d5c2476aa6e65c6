"""`make blend`: combine the predictions that runs have kept, without predicting again; the result is a new run.

Weights are chosen on out-of-fold predictions, see `common.ensemble`. The blend's own out-of-fold predictions are
nested: each fold is combined with weights chosen on the other folds. So its score is honest, and so is tuning on it.

Predictions that are a dict are flattened to one row of numbers, with one weight per run. Where they do not all fit into
memory, weights are chosen on evenly spaced rows, and the predictions are combined block by block.
"""

import argparse
import csv
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import ensemble, raw
from common import run as runs
from common.batch import Tree, concatenated, map_tree
from common.competition import Competition
from common.config import Config
from common.defaults import completed
from common.device import use_threads
from common.ensemble import PLAIN, RANKS, Blend, Choose, Fitted, Space, power
from common.errors import UserError, some
from common.files import expanded, number_in
from common.inference import decisions_of
from common.loading import folds
from common.loading.loader import in_order
from common.metrics import Metric, without_ones
from common.mistakes import names_or_numbers
from common.page import finish_page
from common.predict import Member, write_submission
from common.predictions import (
    Predictions,
    PredictionWriter,
    leaves,
    read_ids,
    read_predictions,
    rebuilt,
    unpack,
    write_ids,
)
from common.report import Report, score_line
from common.run import Run
from common.runs_table import best_run, is_complete
from common.scoring import score_oof
from common.task import Task
from common.train import provenance_of

LARGEST = 200_000_000  # most numbers, over all members, that weights are chosen on
SHOWN = 60  # characters of a line in a message
HIGHEST = float(np.finfo(np.float32).max)
BLOCK = 4_000_000  # numbers, over all members, that are combined at once


@dataclass(frozen=True)
class Kept:
    """Predictions of one member for the rows `ids`: of a run, or from a CSV file of another program."""

    name: str
    where: str  # for messages
    values: Predictions  # arrays [n, ...], on disk
    ids: Sequence[str]  # m
    places: np.ndarray  # [m]: the row of each id in `values`

    @staticmethod
    def of_run(run: Run, kind: str) -> "Kept":
        """The "oof" or "test" predictions that a run keeps; without any raises UserError with the remedy."""
        again = run.again(kind)
        values = read_predictions(run.path, kind, again)
        if values is None:
            what = "predictions of test rows" if kind == "test" else "out-of-fold predictions"
            had = kind == "test" or run.result["rows"]  # else nothing was held out
            remedy = again if had else "leave it out, or train it with --fold all"
            raise UserError(f"{run.path} has no {what}: {remedy}")
        names = read_ids(run.path, kind, again)
        return Kept(run.name, str(run.path), values, names, np.arange(len(names)))

    @staticmethod
    def of_file(path: Path, like: "Kept") -> "Kept":
        """Read a CSV file: an id and predictions in every row, in the order of the columns and the shape of `like`."""
        if len(like.shapes) > 1:
            raise UserError(f"{path}: a CSV cannot hold predictions with several parts ({', '.join(like.shapes)})")
        (shape,) = like.shapes.values()
        found: dict[str, list[float]] = {}
        try:
            with open(path, newline="", encoding="utf-8-sig") as stream:
                lines = csv.reader(stream)
                next(lines, None)  # the header
                for row in filter(None, lines):
                    cells = [number_in(cell) for cell in row[1:]]
                    known = all(cell is not None and abs(cell) <= HIGHEST for cell in cells)
                    if not known or len(cells) != like.numbers or row[0] in found:
                        raise ValueError(f"line {lines.line_num}: {','.join(row)[:SHOWN]!r}")
                    found[row[0]] = cells
        except (OSError, ValueError, csv.Error) as error:
            expected = f"below a header every id once, with {like.numbers} finite numbers per row"
            raise UserError(f"{path} cannot be read ({error}): expected {expected}") from error
        values = np.array(list(found.values()), np.float32).reshape(len(found), *shape)
        return Kept(path.stem, str(path), values, list(found), np.arange(len(found)))

    def taken(self, ids: Sequence[str]) -> "Kept":
        """The rows `ids`, in their order; raises UserError when some are missing."""
        place = dict(zip(self.ids, self.places.tolist(), strict=True))
        if missing := [name for name in ids if name not in place]:
            raise UserError(
                f"{self.where} has no predictions for {len(missing)} of {len(ids)} rows, the first is {missing[0]}: "
                f"blend predictions of the same rows"
            )
        return replace(self, ids=ids, places=np.array([place[name] for name in ids], int))

    def rows(self, part: slice | np.ndarray) -> np.ndarray:
        """The predictions of some of the m rows, [k, ...]; those that are a dict are flattened to [k, numbers].

        Raises UserError for numbers that are not finite: no run keeps these, but a file may have been put in its place.
        """
        places = self.places[part]
        arrays = [np.asarray(unpack(values[places])) for _, values in sorted(leaves(self.values).items())]
        for array in arrays:
            if (odd := np.argwhere(~np.isfinite(array))).size:
                name = self.ids[np.arange(len(self.ids))[part][odd[0, 0]]]
                raise UserError(
                    f"{self.where}: the predictions of {name} are NaN or infinite, expected finite numbers: restore "
                    f"the predictions that it kept, or leave it out"
                )
        return arrays[0] if len(arrays) == 1 else np.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row, for every leaf."""
        return {leaf: values.shape[1:] for leaf, values in sorted(leaves(self.values).items())}

    @property
    def numbers(self) -> int:
        """How many numbers one row has, over all leaves."""
        return sum(map(math.prod, self.shapes.values()))


def as_tree(numbers: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> Predictions:
    """Turn the numbers of `Kept.rows` back into a tensor or a dict of tensors."""
    values = torch.from_numpy(np.ascontiguousarray(numbers))
    if len(shapes) == 1:
        return rebuilt(dict.fromkeys(shapes, values))
    parts = values.split([math.prod(shape) for shape in shapes.values()], dim=1)
    return {leaf: part.reshape(-1, *shape) for (leaf, shape), part in zip(shapes.items(), parts, strict=True)}


def blend(competition: Competition, given: argparse.Namespace) -> None:
    """Combine the runs that --run names, or else all comparable runs; writes a new run and its submission."""
    started, space = time.monotonic(), _space(given)
    name = competition.name
    there = given.name and (runs.folder_of(name, given.name) / "run.json").is_file()
    if there and not runs.load(name, given.name).is_unfinished_blend:
        raise UserError(f"--name {given.name} already exists: give the blend another name")
    members = _members(competition, given.run)
    base, config = members[0], members[0].config(competition.config_class)
    use_threads(config)
    found = raw.of_run(base.provenance, given.data, competition.write_demo)
    task = completed(competition.build(config, found, print), found)
    if task.fingerprint != base.provenance["data_fingerprint"]:
        raise UserError(
            f"{base.name} was trained on other data than {found.path}: pass its data with DATA=folder-or-zip"
        )
    if folds.fingerprint(task.data.folds, task.data.ids) != base.provenance["folds_fingerprint"]:
        raise UserError(
            f"the code of competitions/{name} now makes other folds or ids than {base.name} was trained with: check "
            f"out commit {base.provenance['commit']} to blend, or train the runs again"
        )
    oof = [Kept.of_run(run, "oof") for run in members]
    ids, common = list(map(str, task.data.ids)), set.intersection(*(set(one.ids) for one in oof))
    rows = np.array([row for row in np.argsort(task.data.folds, kind="stable") if ids[row] in common], int)
    if not len(rows):
        raise UserError(
            f"{', '.join(run.name for run in members)} hold out no common rows: blend runs trained with --fold all"
        )
    oof = _aligned(oof, given.oof, [ids[row] for row in rows])
    test = _aligned([Kept.of_run(run, "test") for run in members], given.test, list(map(str, task.data.test_ids)))
    if len(oof) != len(test):
        raise UserError("--oof and --test: expected equally many files, in the same order: --oof a.csv --test b.csv")
    chosen = choose(task, config, oof, rows, given, space)

    provenance = provenance_of(competition, task, "blend", found) | {"demo": base.provenance["demo"]}
    names = [one.name for one in oof]
    told = {"by": given.by + ", per class" * given.per_class, "space": given.space, "members": names}
    run = runs.new_run(name, given.name, config, provenance, told)
    folds.write_csv(run.path / "folds.csv", task.data.folds, task.data.ids)
    kept = task.postprocess.kept
    if given.by == "stack" or space is RANKS:
        kept = "float32"  # a ridge regression may leave 0..1, and the highest of many ranks would tie
    parts = [(np.flatnonzero(task.data.folds[rows] == fold), fitted) for fold, fitted in chosen.by_part.items()]
    write_combined(run.path, "oof", oof, parts, space, kept)
    write_combined(run.path, "test", test, [(np.arange(len(test[0].ids)), chosen.fitted)], space, kept)
    write_ids(run.path, "test", test[0].ids)
    result = {"monitor": task.metrics[0].name, **score_oof(run, task, config, rows), "folds": [], "micro_batch": None}
    result |= {"blend": _facts(names, chosen, task.metrics[0])}
    run.write_result(result | {"training_seconds": round(time.monotonic() - started, 1)})
    run.log(f"{run.path}: {score_line(result)} {_gain(result['blend'])}")
    _report(Member(run, task, config), result, chosen)
    path = write_submission(name, [Member(run, task, config)], run.provenance["demo"])
    run.finish()
    print(f"report: {run.report}\nsubmission: {path}")


def _space(given: argparse.Namespace) -> Space:
    if given.by in ("nnls", "stack") and given.space != "plain":
        raise UserError(f"--space {given.space}: --by {given.by} combines predictions as they are, leave --space out")
    if given.by == "stack" and given.per_class:
        raise UserError("--per-class: a stack uses all classes of all runs at once, leave it out")
    if given.space in ("plain", "rank"):
        return {"plain": PLAIN, "rank": RANKS}[given.space]
    word, _, text = given.space.partition(":")
    exponent = number_in(text)
    if word == "power" and exponent is not None and math.isfinite(exponent):
        return power(exponent)
    raise UserError(f"--space {given.space}: expected plain, rank or power:P, power:0 is the geometric mean")


def _members(competition: Competition, named: str | None) -> list[Run]:
    """The runs to blend; raises UserError when one has other folds, data or outputs than the first."""
    name = competition.name
    if named is not None:
        found = runs.finished(name, named)
    else:
        there = [run for run in runs.all_runs(name) if run.result and not run.is_blend and is_complete(run, run.result)]
        there = [run for run in there if not run.provenance["demo"]] or there
        best = best_run(name, [run.name for run in there], competition.source.higher_is_better)
        if best is None:
            raise UserError(f"no run of {name} holds out every fold: make train COMP={name} FOLD=all")
        lead = runs.load(name, best[0])
        found = [lead, *(run for run in there if run.name != lead.name and not _unlike(lead, run))]
        out = [f"{run.name} (other {unlike})" for run in there if (unlike := _unlike(lead, run))]
        left_out = f"; not comparable with {lead.name}: {some(out)}" * bool(out)
        print(f"blending {', '.join(run.name for run in found)}{left_out}")
    for run in found:
        if unlike := _unlike(found[0], run):
            seeds = f", by --folds and --seed, or make predict COMP={name} RUN={named}, which averages any runs"
            raise UserError(
                f"runs {found[0].name} and {run.name} have different {unlike}: blend runs with the same"
                f"{seeds * (unlike == 'folds')}"
            )
    return found


def _unlike(one: Run, other: Run) -> str:
    facts = {"folds_fingerprint": "folds", "data_fingerprint": "data", "demo": "data (demo)", "outputs": "outputs"}
    return next((word for fact, word in facts.items() if one.provenance.get(fact) != other.provenance.get(fact)), "")


def _aligned(found: list[Kept], files: str | None, ids: list[str]) -> list[Kept]:
    """The predictions of the runs and of the files, for the rows `ids`; raises UserError when some are missing."""
    shapes = found[0].shapes
    if unlike := [one for one in found if one.shapes != shapes]:
        raise UserError(f"{unlike[0].where} predicts {unlike[0].shapes}, but {found[0].where} {shapes}: leave one out")
    paths = [expanded(name, name) for name in (files or "").split(",") if name]
    added = [Kept.of_file(path, found[0]) for path in paths]
    stems = [one.name for one in found + added]  # lgbm/oof.csv and xgb/oof.csv differ only in their path
    found = found + [replace(one, name=one.where) if stems.count(one.name) > 1 else one for one in added]
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} appears twice: name every run, and every file, once")
    return [one.taken(ids) for one in found]


def choose(
    task: Task, config: Config, oof: list[Kept], rows: np.ndarray, given: argparse.Namespace, space: Space
) -> Blend:
    """Choose how to combine, on the out-of-fold predictions of `rows` [m] or, if these are too many, some of them."""
    step = -(-oof[0].numbers * len(oof) * len(rows) // LARGEST)
    sample = np.arange(len(rows))[::step]
    members, shapes = np.stack([one.rows(sample) for one in oof]), oof[0].shapes
    batches = in_order(task.data.valid, rows[sample], config.batch_size, config.seed)
    targets = map_tree(torch.Tensor.cpu, concatenated([batch.targets for batch in batches]))

    def decide(predictions: np.ndarray) -> Tree:
        return decisions_of(task, as_tree(predictions, shapes), {})  # as in validation: before tuning

    objective = ensemble.maximise(task.metrics[0], targets, decide)
    way = _way(given, objective, targets, members, task.metrics[0], space)
    return ensemble.nested(members, task.data.folds[rows[sample]], way, objective)


def _way(
    given: argparse.Namespace,
    objective: ensemble.Objective,
    targets: Tree,
    members: np.ndarray,
    metric: Metric,
    space: Space,
) -> Choose:
    """The method that --by and --per-class name; raises UserError when the targets do not fit it."""
    ways = {
        "hill": lambda goal: ensemble.hill_climbing(goal, space),
        "optimum": lambda goal: ensemble.optimum(goal, space),
        "mean": lambda goal: ensemble.equal(space),
    }
    if given.by in ways and not given.per_class:
        return ways[given.by](objective)
    if not isinstance(targets, torch.Tensor):
        raise UserError(f"--by {given.by}: the targets have several parts, use --by hill without --per-class")
    truth = targets.numpy()
    if without_ones(truth.shape) == without_ones(members.shape[1:]):
        truth = truth.reshape(members.shape[1:])  # [m, 1] is the same as [m], as for metrics
    are_numbers = members.ndim == truth.ndim + 2  # of classes
    if given.by == "stack":
        from sklearn.linear_model import LogisticRegression, Ridge

        return ensemble.stacked(LogisticRegression(max_iter=1000) if are_numbers else Ridge(), truth)
    if not given.per_class:
        return ensemble.least_squares(truth)
    if members.ndim != 3:
        raise UserError(f"--per-class: expected predictions [rows, classes], found {list(members.shape[1:])}")
    columns = (truth[:, None] == np.arange(members.shape[2]) if are_numbers else truth).astype(np.float32)
    if given.by == "nnls":
        return ensemble.per_class(lambda label: ensemble.least_squares(columns[:, label]))
    if are_numbers:
        return ensemble.per_class(lambda label: ways[given.by](_squared_error(columns[:, label])))
    if given.by != "mean":
        try:
            metric.score(members[0, :, 0], columns[:, 0])
        except (UserError, ValueError, RuntimeError, LookupError, TypeError) as error:
            raise UserError(
                f"--per-class --by {given.by}: {metric.name} cannot be computed for a single label ({error}): use "
                f"--by nnls, or leave --per-class out"
            ) from error
    return ensemble.per_class(lambda label: ways[given.by](ensemble.maximise(metric, columns[:, label])))


def _squared_error(column: np.ndarray) -> ensemble.Objective:
    """The objective of a single class where targets are class numbers: their metrics cannot score one class alone."""
    return lambda predictions, rows: -float(np.square(predictions - column[rows]).mean())


def write_combined(
    folder: Path,
    name: str,
    members: list[Kept],
    parts: Sequence[tuple[np.ndarray, Fitted]],
    space: Space,
    kept: str | dict[str, str],
) -> None:
    """Write the combined predictions, the rows of each part by its own `Fitted`; ranks need a part as a whole."""
    shapes, most = members[0].shapes, max(1, BLOCK // (members[0].numbers * len(members)))
    with PredictionWriter(folder, name, sum(len(places) for places, _ in parts), kept) as writer:
        for places, fitted in parts:
            size = len(places) if space is RANKS else most
            for start in range(0, len(places), size):
                block = places[start : start + size]
                combined = fitted(np.stack([one.rows(block) for one in members]))
                writer.add(as_tree(combined, shapes))


def _facts(names: list[str], chosen: Blend, metric: Metric) -> dict[str, Any]:
    """The blend's entry in result.json; scores are of the metric, before tuning."""
    by_member = {"scores": metric.sign * chosen.members, "scores_without": metric.sign * chosen.without}
    if chosen.weights is not None:  # a stack has none
        by_member["weights"] = chosen.weights
    facts = {fact: dict(zip(names, np.round(values, 6).tolist(), strict=True)) for fact, values in by_member.items()}
    score, mean = metric.sign * chosen.score, metric.sign * chosen.mean
    return {"score": score, "mean": mean, "rows": len(chosen.predictions), **facts}


def _gain(facts: dict[str, Any]) -> str:
    """What the blend gains over equal weights and over its members, with the weights unless they are by class."""
    alone = ", ".join(f"{name} {score:.5f}" for name, score in facts["scores"].items())
    weights = facts.get("weights", {}).items()
    told = ", ".join(f"{name} {round(weight, 3)}" for name, weight in weights if isinstance(weight, float))
    return (
        f"Before tuning, nested over folds: blend {facts['score']:.5f}, equal weights {facts['mean']:.5f}; "
        f"single runs: {alone}."
        f"{' Weights: ' * bool(told)}{told}"
    )


def _report(member: Member, result: dict[str, Any], chosen: Blend) -> None:
    """Write the page: members with their weights and scores, correlations, mistakes."""
    run, task, _ = member
    facts, sign = result["blend"], task.metrics[0].sign
    names, weights = list(facts["scores"]), facts.get("weights")
    page = Report(run.path, f"{run.provenance['competition']}: {run.name}, a blend of {len(names)}")
    page.text(score_line(result))
    page.text(_gain(facts))
    page.heading("Members")
    by_class = chosen.weights is not None and chosen.weights.ndim == 2
    rows = []
    for name in names:
        weight = float(np.mean(weights[name])) if weights else ""
        without = facts["scores_without"][name]
        rows.append((name, weight, facts["scores"][name], without, sign * (facts["score"] - without)))
    weight = "weight, mean over classes" if by_class else "weight"
    page.table(["member", weight, "alone", "the blend without it", "costs"], rows)
    if by_class:
        page.heading("Weights of every class")
        classes = names_or_numbers(task.names, chosen.weights.shape[1])
        page.table(["class", *names], zip(classes, *weights.values(), strict=True))
    page.heading("Correlation of the predictions")
    page.table(["", *names], [(name, *row) for name, row in zip(names, chosen.correlation.tolist(), strict=True)])
    page.heading("Provenance")
    page.table(["fact", "value"], run.provenance.items())
    try:
        finish_page(page, member)
    except Exception as error:  # a competition's own plot may raise anything
        page.write()
        run.log(f"the report of {run.path} is not complete: {type(error).__name__}: {error}")
