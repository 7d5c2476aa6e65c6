"""What follows the folds: their out-of-fold predictions are joined, tuned on and scored."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.batch import map_tree
from common.config import Config
from common.errors import first_line
from common.files import read_json, read_npy, read_table
from common.fold import FACTS, write_metrics
from common.inference import decided, decisions_of
from common.loading.keys import keyed_seed
from common.loading.loader import in_order
from common.metrics import Scores
from common.predictions import (
    Predictions,
    PredictionWriter,
    count_of,
    leaves,
    mean_of,
    part_of,
    read_predictions,
    remove_predictions,
    unpack,
    writable,
    write_ids,
    write_predictions,
)
from common.report import score_line
from common.run import Run
from common.task import Task, Tuned

ROWS_AT_ONCE = 64  # of predictions that are copied
PARTS = 5  # of the rows of a single fold: each is decided by rules tuned on the others
LARGEST_COPY = 4 << 30  # bytes of predictions that are tuned on part by part


class Apart(NamedTuple):
    """The parts of some rows, and for each part the rules that were tuned on the others."""

    part: np.ndarray  # [m] number of each row's part
    tuned: dict[int, Tuned]


def finish(run: Run, task: Task, config: Config, folders: list[Path]) -> None:
    """Join the folds' predictions, tune on them, score them, and mark the run as trained."""
    facts = [read_json(folder / FACTS) for folder in folders]
    result = {
        "monitor": task.metrics[0].name,
        "score": None,
        "metrics": {},
        "tuned": {},
        "rows": 0,
        "training_seconds": round(sum(fold["seconds"] for fold in facts), 1),
        "micro_batch": min((fold["micro_batch"] for fold in facts if "micro_batch" in fold), default=None),
        "folds": facts,
    }
    if (tables := [folder / "metrics.csv" for folder in folders])[0].is_file():
        write_metrics(run.path, [row for table in tables for row in read_table(table)])
    if read_predictions(folders[0], "oof") is not None:
        rows = np.concatenate([read_npy(folder / "oof_rows.npy") for folder in folders])
        join([read_predictions(folder, "oof") for folder in folders], run.path, len(rows))
        result |= score_oof(run, task, config, rows)
    if task.fit_predict and len(task.data.test):
        parts = [unpack(read_predictions(folder, "test")) for folder in folders]
        write_predictions(run.path, "test", mean_of(parts), len(task.data.test), task.postprocess.kept)
        write_ids(run.path, "test", task.data.test_ids)
    run.write_result(result)
    for folder in folders if task.network else ():
        remove_predictions(folder, "oof")  # the network makes them again if a fold is to be trained again
    run.log(f"{run.path}: {score_line(result)} Trained {result['training_seconds']} s")


def score_oof(run: Run, task: Task, config: Config, rows: np.ndarray) -> dict[str, Any]:
    """Write the ids of the run's out-of-fold predictions, tune on these, score them; returns facts for result.json."""
    predictions = read_predictions(run.path, "oof")
    write_ids(run.path, "oof", (task.data.ids[row] for row in rows))
    tuned = _tuned(task, writable(predictions), rows)  # torch would write to read-only ones and crash
    apart = _apart(run, task, config, predictions, rows) if tuned and "score" not in tuned else None
    whole, by_fold, honest = score_kept(task, config, predictions, rows, tuned, apart)
    found, monitor = whole.found(), task.metrics[0].name
    errors = {name: error for name, (_, error) in found.items()}
    if apart:
        tuned["score"], errors[monitor] = honest.found()[monitor]
    scores = {fold: of_fold.found()[monitor][0] for fold, of_fold in sorted(by_fold.items())}
    return {
        "tuned": tuned,
        "rows": len(rows),
        "metrics": {name: score for name, (score, _) in found.items()},
        "errors": {name: error for name, error in errors.items() if math.isfinite(error)},
        "score": tuned.get("score", found[monitor][0]),
        "fold_scores": {str(fold): score for fold, score in scores.items()},
        "mean": float(np.mean(list(scores.values()))),
        "std": float(np.std(list(scores.values()), ddof=1)) if len(scores) > 1 else None,
    }


def _tuned(task: Task, predictions: Predictions, rows: np.ndarray) -> Tuned:
    """By way of JSON: scores are made with the same values that a prediction will read."""
    return json.loads(json.dumps(task.postprocess.tune(predictions, rows), default=lambda array: array.tolist()))


def _apart(run: Run, task: Task, config: Config, predictions: Predictions, rows: np.ndarray) -> Apart | None:
    """Tune on all parts but one, for every part: the folds, or random fifths of a single fold.

    None if the predictions are too large to copy, or if the rules need the rows that are left out.
    """
    part = task.data.folds[rows]
    if len(np.unique(part)) == 1:
        part = np.random.default_rng(keyed_seed(config.seed, PARTS)).permutation(len(rows)) % PARTS
    if len(np.unique(part)) == 1 or sum(values.nbytes for values in leaves(predictions).values()) > LARGEST_COPY:
        return None
    tuned = {}
    for number in np.unique(part).tolist():
        rest = np.flatnonzero(part != number)
        try:
            tuned[number] = _tuned(task, part_of(predictions, rest), rows[rest])
            decisions_of(task, unpack(part_of(predictions, rest[:1])), tuned[number])
        except Exception as error:  # the competition's own code: it has worked on all rows
            run.log(f"no score on other rows: tuning on {len(rest)} of {len(rows)} rows fails ({first_line(error)})")
            return None
    return Apart(part, tuned)


def join(parts: list[Predictions], folder: Path, rows: int) -> None:
    """Write the predictions of several folds as one, without holding them in memory together."""
    kept = {leaf: values.dtype.name for leaf, values in leaves(parts[0]).items()}
    with PredictionWriter(folder, "oof", rows, kept) as writer:
        for part in parts:
            for start in range(0, count_of(part), ROWS_AT_ONCE):
                writer.add_packed(leaves(part_of(part, slice(start, start + ROWS_AT_ONCE))))


def score_kept(
    task: Task,
    config: Config,
    predictions: Predictions,
    rows: np.ndarray,
    tuned: Tuned,
    apart: Apart | None = None,
) -> tuple[Scores, dict[int, Scores], Scores]:
    """The metrics of kept predictions [m, ...] of `rows` [m], decided by `tuned`: over all rows, and by fold.

    And the first metric over all rows, each decided by the rules of its part in `apart`.
    """
    whole, by_fold, position = Scores(task.metrics, with_errors=True), {}, 0
    honest = Scores(task.metrics[:1], with_errors=True)
    for batch in in_order(task.data.valid, rows, config.batch_size, config.seed):
        part = slice(position, position + len(batch))
        decisions, targets = decided(task, unpack(part_of(predictions, part)), batch.targets, tuned)
        whole.add(decisions, targets)
        for fold, own in _groups(task.data.folds[rows[part]]):
            scores = by_fold.setdefault(fold, Scores(task.metrics))
            scores.add(*(map_tree(lambda x: x[own.to(x.device)], tree) for tree in (decisions, targets)))  # noqa: B023
        for number, own in _groups(apart.part[part]) if apart else ():
            its = map_tree(lambda x: x[own.to(x.device)], batch.targets)  # noqa: B023
            honest.add(*decided(task, unpack(part_of(predictions, position + own.numpy())), its, apart.tuned[number]))
        position += len(batch)
    return whole, by_fold, honest


def _groups(numbers: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    """(number, places that have it) of every number in `numbers` [B]."""
    for number in np.unique(numbers).tolist():
        yield number, torch.from_numpy(np.flatnonzero(numbers == number))
