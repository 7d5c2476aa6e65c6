"""What follows the folds: their out-of-fold predictions are joined, tuned on and scored."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.batch import map_tree
from common.config import Config
from common.files import read_json, read_npy, read_table
from common.fold import FACTS, write_metrics
from common.inference import decided
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
from common.task import Task

ROWS_AT_ONCE = 64  # of predictions that are copied or scored


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
    # By way of JSON: scores are made with the same values that a prediction will read.
    found = task.postprocess.tune(writable(predictions), rows)  # torch would write to read-only ones and crash
    tuned = json.loads(json.dumps(found, default=lambda array: array.tolist()))
    whole, by_fold = score_kept(task, config, predictions, rows, tuned)
    found, monitor = whole.found(), task.metrics[0].name
    scores = {fold: of_fold.found()[monitor][0] for fold, of_fold in sorted(by_fold.items())}
    return {
        "tuned": tuned,
        "rows": len(rows),
        "metrics": {name: score for name, (score, _) in found.items()},
        "errors": {name: error for name, (_, error) in found.items() if math.isfinite(error)},
        "score": tuned.get("score", found[monitor][0]),
        "fold_scores": {str(fold): score for fold, score in scores.items()},
        "mean": float(np.mean(list(scores.values()))),
        "std": float(np.std(list(scores.values()), ddof=1)) if len(scores) > 1 else None,
    }


def join(parts: list[Predictions], folder: Path, rows: int) -> None:
    """Write the predictions of several folds as one, without holding them in memory together."""
    kept = {leaf: values.dtype.name for leaf, values in leaves(parts[0]).items()}
    with PredictionWriter(folder, "oof", rows, kept) as writer:
        for part in parts:
            for start in range(0, count_of(part), ROWS_AT_ONCE):
                writer.add_packed(leaves(part_of(part, slice(start, start + ROWS_AT_ONCE))))


def score_kept(
    task: Task, config: Config, predictions: Predictions, rows: np.ndarray, tuned: dict[str, Any]
) -> tuple[Scores, dict[int, Scores]]:
    """The metrics of kept predictions [m, ...] of `rows` [m], decided by `tuned`: over all rows, and by fold."""
    whole, by_fold, position = Scores(task.metrics, with_errors=True), {}, 0
    for batch in in_order(task.data.valid, rows, config.batch_size, config.seed):
        part = slice(position, position + len(batch))
        decisions, targets = decided(task, unpack(part_of(predictions, part)), batch.targets, tuned)
        whole.add(decisions, targets)
        of_fold = task.data.folds[rows[part]]
        for fold in np.unique(of_fold).tolist():
            own = torch.from_numpy(np.flatnonzero(of_fold == fold))
            scores = by_fold.setdefault(fold, Scores(task.metrics))
            scores.add(*(map_tree(lambda x: x[own.to(x.device)], tree) for tree in (decisions, targets)))  # noqa: B023
        position += len(batch)
    return whole, by_fold
