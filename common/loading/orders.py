"""Which rows make up the batches of an epoch: functions (seed, epoch) -> Plan, the same in every process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from common.errors import UserError
from common.loading.folds import filled
from common.loading.keys import ORDER_STREAM, KeyedGenerator

Rows = int | np.ndarray  # a number of rows n (all of 0..n-1), or the row numbers themselves


@dataclass(frozen=True)
class Plan:
    """The samples of an epoch in their global order.

    `index` [m] are rows of the dataset, `draw` [m] counts how often the row came before in this epoch (zeros unless
    rows repeat), `sizes` are the sizes of the batches if the order decides them, None if the batch size does.
    """

    index: np.ndarray
    draw: np.ndarray
    sizes: np.ndarray | None = None

    def bounds(self, batch_size: int) -> np.ndarray:
        """Batch w holds the samples bounds[w] to bounds[w + 1], int64 [batches + 1]; the last one may be short."""
        if self.sizes is not None:
            return np.concatenate([[0], np.cumsum(self.sizes)])
        return np.append(np.arange(0, len(self.index), batch_size), len(self.index))


Order = Callable[[int, int], Plan]


def shard(size: int, rank: int, world: int) -> tuple[int, int]:
    """The samples start..stop of a batch of `size` that `rank` loads: contiguous, and never half of a pair.

    Samples 2k and 2k + 1 of a batch are a pair for MixUp and CutMix, which therefore never need another process.
    """
    pairs = (size + 1) // 2
    return min(pairs * rank // world * 2, size), min(pairs * (rank + 1) // world * 2, size)


def sequential(rows: Rows) -> Order:
    """Every row once, in the given order, the same in every epoch."""
    plan = _once(_row_numbers(rows))
    return lambda seed, epoch: plan


def shuffled(rows: Rows) -> Order:
    """Every row once, in a different order in every epoch."""
    rows = _row_numbers(rows)
    return lambda seed, epoch: _once(rows[_generator(seed, epoch).permutation(len(rows))])


def weighted(weights: np.ndarray, samples_per_epoch: int | None = None, rows: np.ndarray | None = None) -> Order:
    """`samples_per_epoch` draws with replacement, row i with probability weights[i] / sum(weights).

    `rows` are the row numbers that `weights` [n] belong to (default 0..n-1). A row that is drawn again in an epoch has
    another key, hence another augmentation. Raises UserError for negative, infinite, NaN or only zero weights.
    """
    weights, rows = np.asarray(weights, np.float64), _row_numbers(len(weights) if rows is None else rows)
    if len(rows) != len(weights) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum() > 0:
        raise UserError(
            f"sampling weights: expected {len(rows)} finite numbers from 0 up, not all 0, found "
            f"{len(weights)} from {weights.min()} to {weights.max()}"
        )
    edges = np.cumsum(weights)
    edges /= edges[-1]  # exactly 1 at the end, above every draw

    def order(seed: int, epoch: int) -> Plan:
        drawn = _generator(seed, epoch).random(samples_per_epoch or len(rows))
        index = rows[np.searchsorted(edges, drawn, side="right")]
        return Plan(index, _repeats(index))

    return order


def by_rarity(labels: Any) -> np.ndarray:
    """Weights [n] for `weighted` by the rarest label of each row: clip(ln(total / (2 count)), 1, 10).

    Rows with rare labels come more often, but at most ten times (Human Protein Atlas). `labels` [n, L] of 0 and 1 is a
    dense or sparse array; every row needs a label.
    """
    labels = csr_matrix(labels)
    if len(bare := np.flatnonzero(np.diff(labels.indptr) == 0)):
        raise UserError(f"by_rarity: {len(bare)} rows have no label, the first is row {bare[0]}: every row needs one")
    counts = np.asarray(labels.sum(axis=0, dtype=np.int64)).ravel()
    of_label = np.clip(np.log(0.5 * counts.sum() / np.maximum(counts, 1)), 1, 10)
    return np.maximum.reduceat(of_label[labels.indices], labels.indptr[:-1])


def grouped(groups: np.ndarray, rows: np.ndarray | None = None, groups_per_batch: int = 1) -> Order:
    """Every batch is all rows of a group (or of a few groups); the groups are shuffled in every epoch.

    `groups` [n] names the group of each of `rows` (default 0..n-1). The batch size is ignored.
    """
    groups = filled(groups, "group")
    rows = _row_numbers(len(groups) if rows is None else rows)
    if len(groups) != len(rows) or groups_per_batch < 1:
        raise UserError(
            f"grouped: {len(groups)} groups for {len(rows)} rows, {groups_per_batch} groups in a batch: expected a "
            "group for every row, as in grouped(groups[rows], rows), and 1 or more in a batch"
        )
    _, number = np.unique(groups, return_inverse=True)
    counts = np.bincount(number)
    members = np.split(rows[np.argsort(number, kind="stable")], np.cumsum(counts)[:-1])

    def order(seed: int, epoch: int) -> Plan:
        chosen = _generator(seed, epoch).permutation(len(counts))
        sizes = np.add.reduceat(counts[chosen], np.arange(0, len(chosen), groups_per_batch))
        index = np.concatenate([members[group] for group in chosen])
        return Plan(index, np.zeros(len(index), np.int64), sizes)

    return order


def joined(order: Order, rows: np.ndarray) -> Order:
    """Insert each of `rows` once between the samples of `order`, at different places in every epoch.

    Raises UserError for an order that decides the batches itself.
    """

    def both(seed: int, epoch: int) -> Plan:
        plan = order(seed, epoch)
        if plan.sizes is not None:
            raise UserError("rows cannot be added to an order that fixes its batches, such as `grouped`")
        total = len(plan.index) + len(rows)
        place = _generator(seed, epoch, 1).permutation(total)[: len(rows)]
        own = np.setdiff1d(np.arange(total), place)
        index, draw = np.empty(total, np.int64), np.zeros(total, np.int64)
        index[place], index[own], draw[own] = rows, plan.index, plan.draw
        return Plan(index, draw)

    return both


def _row_numbers(rows: Rows) -> np.ndarray:
    """The rows [n]; raises UserError for none, and for what is no list of row numbers."""
    rows = np.arange(rows) if isinstance(rows, (int, np.integer)) else np.asarray(rows)
    if not len(rows):
        raise UserError("an order of no rows: expected at least one; is the fold, or the folder of images, empty?")
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < 0:
        raise UserError(
            f"the rows of an order are an array {list(rows.shape)} of {rows.dtype}, {rows[0]} first: expected row "
            "numbers [n] from 0 up; of a mask they are np.flatnonzero(mask)"
        )
    return rows.astype(np.int64)


def _once(rows: np.ndarray) -> Plan:
    return Plan(rows, np.zeros(len(rows), np.int64))


def _generator(seed: int, epoch: int, number: int = 0) -> np.random.Generator:
    return KeyedGenerator().jump(seed, epoch, number, stream=ORDER_STREAM)


def _repeats(index: np.ndarray) -> np.ndarray:
    """How often each entry came before: [5, 7, 5, 5] gives [0, 0, 1, 2]."""
    import pandas as pd  # half a second, only when drawing with replacement

    return pd.Series(index).groupby(index).cumcount().to_numpy()
