"""Losses of numbers. Targets that are NaN are missing: they weigh nothing, and a batch of nothing else has value 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.losses.missing import filled, known, masked_mean, share
from common.losses.protocol import full_precision


def _pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs and targets [B, ...] in one dtype with missing targets 0, and the mask of the known ones."""
    outputs, mask = full_precision(outputs), known(targets)
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs {list(outputs.shape)} and targets {list(targets.shape)} differ in shape")
    return outputs, filled(targets, mask, outputs.dtype), mask


@dataclass(frozen=True)
class MAE:
    """|y - t|, the mean over entries. Per sample. outputs, targets [B, ...]."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets, mask = _pair(outputs, targets)
        return masked_mean((outputs - targets).abs(), mask)

    def mass(self, targets: Tensor) -> Tensor:
        return share(known(targets), targets)


@dataclass(frozen=True)
class MSE:
    """(y - t)^2, the mean over entries. Per sample. outputs, targets [B, ...]."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets, mask = _pair(outputs, targets)
        return masked_mean((outputs - targets).square(), mask)

    def mass(self, targets: Tensor) -> Tensor:
        return share(known(targets), targets)


@dataclass(frozen=True)
class RMSE:
    """sqrt(mean (y - t)^2), the mean over all known entries of the batch. One sum, so one pass.

    outputs, targets [B, ...]. The square root has slope 0, not infinity, where every error is 0.
    """

    def stats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return MSE()(outputs, targets)

    def mass(self, targets: Tensor) -> Tensor:
        return share(known(targets), targets)

    def value(self, sums: Tensor, count: Tensor) -> Tensor:
        some = (sums != 0) & (count != 0)
        return torch.where(some, torch.where(some, sums / torch.where(some, count, 1), 1.0).sqrt(), 0.0)


@dataclass(frozen=True)
class ClippedMAE:
    """min(|y - t|, limit), the mean over entries (KDD Cup 2018, J.-F. Puget). Per sample. outputs, targets [B, ...].

    Errors beyond the limit have no gradient: scale the targets so that most are within, or prefer LogSMAPE.
    """

    limit: float = 1.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets, mask = _pair(outputs, targets)
        return masked_mean((outputs - targets).abs().clamp(max=self.limit), mask)

    def mass(self, targets: Tensor) -> Tensor:
        return share(known(targets), targets)


@dataclass(frozen=True)
class SMAPE:
    """2 |y - t| / (|y| + |t|), from 0 to 2, the mean over entries (KDD Cup 2018). Per sample. Both are [B, ...].

    0/0 is 0 with gradient 0. For an output of the wrong sign, and for every output when t = 0, the formula is the
    constant 2: there is nothing to learn from. A `floor` above 0 bounds the denominator from below, which gives those
    near 0 a slope again; a model with outputs in logarithms is better served by LogSMAPE.
    """

    floor: float = 0.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets, mask = _pair(outputs, targets)
        below = (outputs.abs() + targets.abs()).clamp(min=self.floor)
        empty = below < torch.finfo(below.dtype).tiny  # a denormal denominator would have an infinite slope
        values = torch.where(empty, 0.0, 2 * (outputs - targets).abs() / torch.where(empty, 1.0, below))
        return masked_mean(values, mask)

    def mass(self, targets: Tensor) -> Tensor:
        return share(known(targets), targets)


@dataclass(frozen=True)
class LogSMAPE:
    """2 tanh(|d| / 2), d = y - t with y and t logarithms: the SMAPE of exp y and exp t, exactly. Per sample.

    outputs, targets [B, ...], the mean over entries; log1p of counts gives the SMAPE of the counts plus one. No 0/0,
    no dead zone in the sign, and a slope which fades as exp(-|d|) for outliers.
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets, mask = _pair(outputs, targets)
        return masked_mean(2 * ((outputs - targets).abs() / 2).tanh(), mask)

    def mass(self, targets: Tensor) -> Tensor:
        return share(known(targets), targets)
