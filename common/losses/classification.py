"""Losses of one label, of many labels, and of label vectors. Outputs are logits unless the loss says otherwise."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses.missing import OfEntries, filled, known, masked_mean, present, sample_mean, share
from common.losses.overlap import mean_of_present, overlap_loss, overlap_sums, sigmoid_pair
from common.losses.protocol import Kind, full_precision, most_precise

NO_CLASS = -(2**31)  # for torch's ignore_index, which is -100 by default: a number that no target has


class CrossEntropy(nn.Module):
    """-sum_c q_c log softmax(z)_c with q the target, smoothed to (1 - s) q + s / C (Szegedy et al. 2016). Per sample.

    outputs [B, C, ...], targets [B, ...] class numbers, or [B, C, ...] probabilities (MixUp). Positions are averaged.
    With class numbers the normaliser is the sum of the class weights of the targets, as in torch. Targets equal to
    `ignore_index` weigh nothing, and a batch of only these has value 0. With probabilities every position weighs 1.
    With `ignore_index` None a target outside 0..C-1 is an error, and counting the valid targets is saved.
    """

    def __init__(
        self,
        class_weights: list[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = -100,
    ):
        super().__init__()
        self.register_buffer("class_weights", _vector(class_weights))
        self.label_smoothing = label_smoothing
        self.ignored = NO_CLASS if ignore_index is None else ignore_index
        if class_weights is None and ignore_index is None:
            self.mass = None  # every sample weighs 1: nothing to add up before the first forward

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = full_precision(outputs)
        if outputs.shape[1] == 1:
            raise ValueError("CrossEntropy of a single class is 0 for any output of the model: for one label use BCE")
        targets = targets.to(outputs.dtype) if targets.is_floating_point() else targets.long()
        weight = self.class_weights
        values = F.cross_entropy(
            outputs,
            targets,
            None if weight is None else weight.to(outputs.dtype),
            ignore_index=self.ignored,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        return sample_mean(values)

    def mass(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return share(None, targets)
        targets = targets.long()  # in uint8, -100 is 156
        counted = targets != self.ignored
        if self.class_weights is None:
            return share(counted, targets)
        weights = most_precise(self.class_weights)
        return sample_mean(torch.where(counted, weights[torch.where(counted, targets, 0)], 0.0))


class BCE(nn.Module):
    """-(a t log p + (1 - t) log(1 - p)), p = sigmoid(z), t smoothed to (1 - s) t + s / 2, a = pos_weight. Per sample.

    outputs, targets [B, ...], the mean over all entries; pos_weight [C] belongs to axis 1. NaN targets weigh nothing.
    With `present_only` (masks [B, C, ...]) channels with an empty mask weigh nothing either, so that only the pixels of
    classes in the image count (Understanding Clouds, 1st place). Otherwise empty masks are background.
    """

    def __init__(
        self,
        pos_weight: list[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        present_only: bool = False,
    ):
        super().__init__()
        self.register_buffer("pos_weight", _vector(pos_weight))
        self.label_smoothing, self.present_only = label_smoothing, present_only

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = full_precision(outputs)
        mask = self._mask(targets)
        targets = filled(targets, mask, outputs.dtype)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        weight = self.pos_weight
        if weight is not None:
            weight = weight.to(outputs.dtype).reshape(-1, *[1] * (outputs.ndim - 2))
        values = F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weight, reduction="none")
        return masked_mean(values, mask)

    def mass(self, targets: Tensor) -> Tensor:
        return share(self._mask(targets), targets)

    def _mask(self, targets: Tensor) -> Tensor | None:
        mask = known(targets)
        if not self.present_only:
            return mask
        there = present(targets).reshape(*targets.shape[:2], *[1] * (targets.ndim - 2))
        return there.expand_as(targets) if mask is None else there & mask


@dataclass(frozen=True)
class Focal(OfEntries):
    """a t (1-p)^g (-log p) + (1-a)(1-t) p^g (-log(1-p)), p = sigmoid(z) (Lin et al. 2017). Per sample.

    outputs, targets [B, ...], the mean over entries; alpha None sets both factors a to 1. NaN targets weigh nothing.
    With empty targets only the second term remains. p^g is computed as exp(g log p), whose gradient at p = 0 is not
    infinite for g < 1.
    """

    gamma: float = 2.0
    alpha: float | None = None

    def entries(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p, log_rest = F.logsigmoid(outputs), F.logsigmoid(-outputs)
        positive = -targets * (self.gamma * log_rest).exp() * log_p
        negative = -(1 - targets) * (self.gamma * log_p).exp() * log_rest
        if self.alpha is not None:
            positive, negative = self.alpha * positive, (1 - self.alpha) * negative
        return positive + negative


@dataclass(frozen=True)
class SoftFBeta:
    """1 - ((1+b^2) TP + s) / (b^2 T + P + s), TP = sum p t, P = sum p, T = sum t, p = sigmoid(z), s = smooth.

    outputs, targets [B, C, ...]. "samples": TP, P, T of each sample over its labels, mean over samples (per sample).
    "macro": of each class over the batch, mean over classes (sums, 3C of them). "micro": of everything (3 sums).
    Hard 0/1 predictions give 1 - sklearn.metrics.fbeta_score for s = 0, where 0/0 counts as F = 1. With empty targets
    the loss is P / (P + s), so false positives cost something unless s = 0, and no clamp removes the gradient.
    `present_only` ("macro") averages over the classes with a positive in the batch; without any the loss is 0.
    """

    beta: float = 1.0
    average: Literal["samples", "macro", "micro"] = "samples"
    smooth: float = 1.0
    present_only: bool = False

    @property
    def kind(self) -> Kind:
        return "per_sample" if self.average == "samples" else "sums"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(overlap_sums(*sigmoid_pair(outputs, targets)).sum(2))

    def stats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        sums = overlap_sums(*sigmoid_pair(outputs, targets))  # [B, 3, C]
        return sums if self.average == "macro" else sums.sum(2)

    def value(self, sums: Tensor, count: Tensor) -> Tensor:
        losses = self._loss(sums[None])[0]  # [C], or one number for "micro"
        if self.average == "macro" and self.present_only:
            return mean_of_present(losses, sums[2] > 0)
        return losses.mean()

    def _loss(self, sums: Tensor) -> Tensor:
        square = self.beta**2
        scale = 1 + square
        return overlap_loss(sums, 1 / scale, square / scale, self.smooth / scale)


@dataclass(frozen=True)
class CosineProximity:
    """1 - x.t / (|x| |t|), for outputs x and label vectors t. Per sample.

    outputs, targets [B, D]. A target of length 0 (an image without labels) has no direction and weighs nothing.
    Norms below `epsilon` count as `epsilon`: the gradient at an output of 0 is at most 1 / epsilon.
    """

    epsilon: float = 1e-6

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = full_precision(outputs)
        cosine = F.cosine_similarity(outputs, targets.to(outputs.dtype), dim=1, eps=self.epsilon)
        return (1 - cosine) * self.mass(targets).to(outputs.dtype)

    def mass(self, targets: Tensor) -> Tensor:
        return (targets != 0).any(1).float()


@dataclass(frozen=True)
class PositivesVersusNegatives:
    """mean over positives k of -log(exp z_k / (exp z_k + sum over negatives j of exp z_j)). Per sample.

    Softmax in which the positives of an image do not compete (Inclusive Images, 4th place); with one positive it is
    the cross-entropy. outputs, targets [B, C]: targets above 0.5 are positive, others negative, NaN neither. Images
    without a positive weigh nothing. Computed as the mean of softplus(logsumexp over negatives - z_k), in memory B x C.
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = full_precision(outputs)
        positive, negative = targets > 0.5, targets <= 0.5
        # a finite floor: logsumexp of nothing but -inf has no gradient when an image holds every label
        floor = torch.finfo(outputs.dtype).min / 4
        negatives = outputs.masked_fill(~negative, floor).logsumexp(1, keepdim=True)  # [B, 1]
        values = torch.where(positive, F.softplus(negatives - outputs), 0.0)
        return values.sum(1) / positive.sum(1).clamp(min=1)

    def mass(self, targets: Tensor) -> Tensor:
        return (targets > 0.5).any(1).float()


def _vector(values: list[float] | Tensor | None) -> Tensor | None:
    return None if values is None else torch.as_tensor(values, dtype=torch.float32)
