"""A fold of a run: its rows, their order, its seed and the files in its folder."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import Config
from common.engine.ranks import Ranks
from common.errors import UserError
from common.files import write_json, write_text
from common.loading import orders
from common.loading.keys import keyed_seed
from common.task import Task

FACTS = "fold.json"  # of a finished fold
PSEUDO_LABELS = "pseudo.pt"  # of an unfinished fold, see common.pseudo
# Columns of metrics.csv that differ between two equal runs.
MACHINE_COLUMNS = ("samples_per_second", "memory_gib")
OWN_COLUMNS = ("fold", "epoch", "step", "lr", "loss", "gradient_norm", "valid_loss", *MACHINE_COLUMNS)


def rows_of_fold(task: Task, fold: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (training, validation) of a fold; raises UserError when either is empty."""
    folds = task.data.folds
    train = np.flatnonzero(folds != fold) if fold is not None else np.arange(len(folds))
    valid = np.flatnonzero(folds == fold) if fold is not None else np.empty(0, int)
    if not len(train) or (fold is not None and not len(valid)):
        raise UserError(
            f"{fold_label(fold)} has {len(train)} rows to train on and {len(valid)} to validate: choose --fold and "
            f"--folds so that both have some"
        )
    return train, valid


def order_of(task: Task, config: Config, rows: np.ndarray) -> orders.Order:
    """The order of a fold's training rows; raises UserError when it holds other rows: they may be validation rows."""
    order = (task.data.order or orders.shuffled)(rows)
    if len(others := np.setdiff1d(order(config.seed, 0).index, rows)):
        raise UserError(
            f"Data.order trains on {len(others)} rows that are not among the {len(rows)} it was given, the first is "
            f"row {others[0]}: build it from its argument, as in lambda rows: orders.weighted(weights[rows], rows=rows)"
        )
    return order


def seed_all(config: Config, fold: int | None) -> None:
    """Seed random, np.random and torch for the fold: the initial weights are the same in every run and process."""
    seed = keyed_seed(config.seed, -1 if fold is None else fold)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def fold_label(fold: int | None) -> str:
    return "all rows" if fold is None else f"fold {fold}"


def write_facts(folder: Path, fold: int | None, seconds: float, facts: dict[str, Any]) -> None:
    """Write fold.json, which marks the fold as finished, with its training time and `facts`."""
    write_json(folder / FACTS, {"fold": fold, "seconds": round(seconds, 1)} | facts)


def remove_checkpoints(folder: Path, ranks: Ranks) -> None:
    """Delete the checkpoints and pseudo-labels of a finished fold: only its weights and predictions are needed now."""
    if ranks.is_writer:
        for name in ("last.pt", "best.pt", PSEUDO_LABELS):
            (folder / name).unlink(missing_ok=True)


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write metrics.csv, a line per epoch; only MACHINE_COLUMNS differ between two equal runs."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    lines = [",".join(str(row.get(name, "")) for name in columns) for row in history]
    write_text(folder / "metrics.csv", "\n".join([",".join(columns), *lines]) + "\n")
