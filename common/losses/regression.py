"""Losses of numbers. Targets that are NaN are missing: they weigh nothing, and a batch of nothing else has value 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.losses.missing import OfEntries


@dataclass(frozen=True)
class MAE(OfEntries):
    """|y - t|, the mean over entries. Per sample. outputs, targets [B, ...]."""

    def entries(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs()


@dataclass(frozen=True)
class MSE(OfEntries):
    """(y - t)^2, the mean over entries. Per sample. outputs, targets [B, ...]."""

    def entries(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square()


@dataclass(frozen=True)
class RMSE:
    """sqrt(mean (y - t)^2), the mean over all known entries of the batch. One sum, so one pass.

    outputs, targets [B, ...]. The square root has gradient 0, not infinity, if every error is 0.
    """

    def stats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return MSE()(outputs, targets)

    def mass(self, targets: Tensor) -> Tensor:
        return MSE().mass(targets)

    def value(self, sums: Tensor, count: Tensor) -> Tensor:
        some = sums != 0
        return torch.where(some, torch.where(some, sums / count, 1.0).sqrt(), 0.0)


@dataclass(frozen=True)
class ClippedMAE(OfEntries):
    """min(|y - t|, limit), the mean over entries (KDD Cup 2018, J.-F. Puget). Per sample. outputs, targets [B, ...].

    Errors beyond the limit have no gradient: scale the targets so that most are within, or prefer LogSMAPE.
    """

    limit: float = 1.0

    def entries(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().clamp(max=self.limit)


@dataclass(frozen=True)
class SMAPE(OfEntries):
    """2 |y - t| / (|y| + |t|), from 0 to 2, the mean over entries (KDD Cup 2018). Per sample. Both are [B, ...].

    0/0 is 0 with gradient 0. For an output of the wrong sign, and for every output when t = 0, the formula is the
    constant 2, which has no gradient. A `floor` above 0 bounds the denominator from below, so that errors near 0 have a
    gradient again. For a model whose outputs are logarithms use LogSMAPE.
    """

    floor: float = 0.0

    def entries(self, outputs: Tensor, targets: Tensor) -> Tensor:
        below = (outputs.abs() + targets.abs()).clamp(min=self.floor)
        empty = below < torch.finfo(below.dtype).tiny  # a denormal denominator would have an infinite gradient
        return torch.where(empty, 0.0, 2 * (outputs - targets).abs() / torch.where(empty, 1.0, below))


@dataclass(frozen=True)
class LogSMAPE(OfEntries):
    """2 tanh(|d| / 2), d = y - t with y and t logarithms: the SMAPE of exp y and exp t, exactly. Per sample.

    outputs, targets [B, ...], the mean over entries; log1p of counts gives the SMAPE of the counts plus one. It has no
    0/0 and no range without a gradient; for outliers the gradient decays as exp(-|d|).
    """

    def entries(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * ((outputs - targets).abs() / 2).tanh()
