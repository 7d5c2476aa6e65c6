"""Every shipped loss with random outputs and targets that suit it, for the tests of losses and of the engine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.losses import (
    BCE,
    MAE,
    MSE,
    RMSE,
    SMAPE,
    BCEDice,
    ClippedMAE,
    CosineProximity,
    CrossEntropy,
    Dice,
    Focal,
    Heads,
    Jaccard,
    LogSMAPE,
    LovaszHinge,
    LovaszSoftmax,
    PositivesVersusNegatives,
    SoftFBeta,
    Tversky,
    Weighted,
)

Sample = Callable[[int, torch.Generator], tuple]  # (n, generator) -> (outputs, targets), trees with n rows


@dataclass(frozen=True)
class Case:
    """`make()` builds the loss; `sample(n, seed)` returns float64 outputs and targets of n samples, some empty."""

    name: str
    kind: str
    make: Callable
    draw: Sample

    def sample(self, n: int, seed: int = 0) -> tuple:
        return self.draw(n, torch.Generator().manual_seed(seed))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def bits(generator: torch.Generator, *shape: int, rate: float = 0.4) -> Tensor:
    """Random 0/1 float64; samples 0, 3, 6, ... are all 0."""
    found = (torch.rand(*shape, generator=generator) < rate).double()
    found[::3] = 0
    return found


def with_gaps(generator: torch.Generator, targets: Tensor) -> Tensor:
    """A copy with about a fifth of the targets NaN, and all targets of samples 1, 5, 9, ..."""
    gaps = torch.rand(targets.shape, generator=generator) < 0.2
    gaps[1::4] = True
    return targets.masked_fill(gaps, float("nan"))


def labels(n: int, g: torch.Generator) -> tuple:
    return normal(g, n, 5), torch.randint(0, 5, (n,), generator=g)


def ignored_labels(n: int, g: torch.Generator) -> tuple:
    outputs, targets = normal(g, n, 5, 7), torch.randint(0, 5, (n, 7), generator=g)
    targets[torch.rand(n, 7, generator=g) < 0.3] = -100
    targets[::4] = -100
    return outputs, targets


def soft_labels(n: int, g: torch.Generator) -> tuple:
    return normal(g, n, 5), normal(g, n, 5).softmax(1)


def multilabel(n: int, g: torch.Generator) -> tuple:
    return normal(g, n, 6), bits(g, n, 6)


def multilabel_gaps(n: int, g: torch.Generator) -> tuple:
    return normal(g, n, 6), with_gaps(g, bits(g, n, 6))


def masks(n: int, g: torch.Generator) -> tuple:
    targets = bits(g, n, 3, 4, 5)
    targets[1::2, 0] = 0  # a class that some images lack
    return normal(g, n, 3, 4, 5), targets


def class_maps(n: int, g: torch.Generator) -> tuple:
    targets = torch.randint(0, 4, (n, 4, 5), generator=g)
    targets[::3] = 0
    targets[:, 0, :2] = -100
    return normal(g, n, 4, 4, 5), targets


def vectors(n: int, g: torch.Generator) -> tuple:
    targets = normal(g, n, 8)
    targets[::3] = 0
    return normal(g, n, 8), targets


def numbers(n: int, g: torch.Generator) -> tuple:
    return normal(g, n, 6), with_gaps(g, normal(g, n, 6))


def amounts(n: int, g: torch.Generator) -> tuple:
    targets = normal(g, n, 6).exp()
    targets[::3] = 0
    return normal(g, n, 6).exp(), with_gaps(g, targets)


def heads(n: int, g: torch.Generator) -> tuple:
    (a, b), (c, d) = masks(n, g), multilabel_gaps(n, g)
    return {"pixels": a, "classes": c}, {"pixels": b, "classes": d}


WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.0]
SHIPPED = [
    Case("cross-entropy", "per_sample", CrossEntropy, labels),
    Case("cross-entropy weights smoothing", "per_sample", lambda: CrossEntropy(WEIGHTS, 0.1), labels),
    Case("cross-entropy weights ignored", "per_sample", lambda: CrossEntropy(WEIGHTS), ignored_labels),
    Case("cross-entropy soft", "per_sample", lambda: CrossEntropy(WEIGHTS, 0.1), soft_labels),
    Case("bce", "per_sample", BCE, multilabel),
    Case("bce pos_weight smoothing gaps", "per_sample", lambda: BCE([1.0, 2, 3, 4, 5, 0.5], 0.1), multilabel_gaps),
    Case("bce present", "per_sample", lambda: BCE(present_only=True), masks),
    Case("focal", "per_sample", Focal, multilabel),
    Case("focal alpha small gamma gaps", "per_sample", lambda: Focal(0.5, 0.25), multilabel_gaps),
    Case("f1 samples", "per_sample", SoftFBeta, multilabel),
    Case("f2 samples gaps", "per_sample", lambda: SoftFBeta(2), multilabel_gaps),
    Case("f1 macro", "sums", lambda: SoftFBeta(average="macro"), multilabel),
    Case("f2 macro present", "sums", lambda: SoftFBeta(2, "macro", 0, present_only=True), multilabel),
    Case("f0.5 micro", "sums", lambda: SoftFBeta(0.5, "micro"), multilabel),
    Case("cosine", "per_sample", CosineProximity, vectors),
    Case("positives versus negatives", "per_sample", PositivesVersusNegatives, multilabel),
    Case("dice image", "per_sample", Dice, masks),
    Case("dice image present", "per_sample", lambda: Dice(present_only=True), masks),
    Case("dice batch", "sums", lambda: Dice("batch"), masks),
    Case(
        "dice batch softmax present", "sums", lambda: Dice("batch", activation="softmax", present_only=True), class_maps
    ),
    Case("jaccard image", "per_sample", Jaccard, masks),
    Case("jaccard image softmax", "per_sample", lambda: Jaccard(activation="softmax", present_only=True), class_maps),
    Case("jaccard batch", "sums", lambda: Jaccard("batch"), masks),
    Case("tversky image", "per_sample", lambda: Tversky(0.3, 0.7), masks),
    Case("tversky batch", "sums", lambda: Tversky(0.3, 0.7, "batch"), masks),
    Case("bce dice", "per_sample", BCEDice, masks),
    Case("bce dice present", "per_sample", lambda: BCEDice(0.75, 0.25, present_only=True), masks),
    Case("bce dice batch present", "sums", lambda: BCEDice(average="batch", present_only=True), masks),
    Case("lovasz hinge", "whole_batch", LovaszHinge, masks),
    Case("lovasz hinge image", "per_sample", lambda: LovaszHinge(per_image=True), masks),
    Case("lovasz softmax", "whole_batch", LovaszSoftmax, class_maps),
    Case("lovasz softmax all", "whole_batch", lambda: LovaszSoftmax(present_only=False), class_maps),
    Case("lovasz softmax image", "per_sample", lambda: LovaszSoftmax(per_image=True), class_maps),
    Case("mae", "per_sample", MAE, numbers),
    Case("mse", "per_sample", MSE, numbers),
    Case("rmse", "sums", RMSE, numbers),
    Case("clipped mae", "per_sample", ClippedMAE, numbers),
    Case("smape", "per_sample", SMAPE, amounts),
    Case("smape floor", "per_sample", lambda: SMAPE(0.5), amounts),
    Case("log smape", "per_sample", LogSMAPE, numbers),
    Case(
        "weighted masses",
        "per_sample",
        lambda: Weighted((BCE(), 0.5), (BCE(present_only=True), 2.0), (BCEDice(present_only=True), 0.25)),
        masks,
    ),
    Case("weighted sums", "sums", lambda: Weighted((MAE(), 0.5), (RMSE(), 2.0)), numbers),
    Case(
        "weighted whole batch",
        "whole_batch",
        lambda: Weighted((BCE(present_only=True), 0.5), (Dice("batch"), 1.0), (LovaszHinge(), 0.3)),
        masks,
    ),
    Case("heads per sample", "per_sample", lambda: Heads({"pixels": BCEDice(), "classes": (Focal(), 0.1)}), heads),
    Case(
        "heads sums",
        "sums",
        lambda: Heads({"pixels": BCEDice(0.75, 0.25, present_only=True), "classes": (SoftFBeta(2, "macro"), 0.1)}),
        heads,
    ),
    Case("heads whole batch", "whole_batch", lambda: Heads({"pixels": LovaszHinge(), "classes": (BCE(), 0.1)}), heads),
]
