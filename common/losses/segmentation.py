"""Losses of masks: overlap ratios per image or over the batch, and the Lovasz extensions of the Jaccard index."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.losses.classification import BCE
from common.losses.combine import Combined, Weighted
from common.losses.missing import filled, known, present
from common.losses.overlap import IGNORED, mean_of_present, overlap_loss, overlap_sums, sigmoid_pair, softmax_pair
from common.losses.protocol import Kind, full_precision


@dataclass(frozen=True)
class Tversky:
    """1 - (TP + s) / (TP + a FP + b FN + s), the mean over classes (Salehi et al. 2017).

    a = false_positive, b = false_negative, s = smooth.
    outputs [B, C, ...]; "sigmoid": targets [B, C, ...] of 0 and 1, NaN is ignored (integer types skip this check);
    "softmax": targets [B, ...] class numbers, -100 is ignored.
    average "image": TP, FP, FN of every image, then the mean over images (per sample). "batch": TP, FP, FN of the whole
    batch (sums, 3C of them), which large objects dominate. The two averages are different losses.
    With empty targets the loss is a P / (a P + s), so false positives cost something as long as smooth > 0.
    `present_only` averages only over the (image, class) pairs, or the classes of the batch, that have a target.
    """

    false_positive: float = 0.5
    false_negative: float = 0.5
    average: Literal["image", "batch"] = "image"
    smooth: float = 1.0
    present_only: bool = False
    activation: Literal["sigmoid", "softmax"] = "sigmoid"

    @property
    def kind(self) -> Kind:
        return "per_sample" if self.average == "image" else "sums"

    def stats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        pair = sigmoid_pair if self.activation == "sigmoid" else softmax_pair
        return overlap_sums(*pair(outputs, targets))  # [B, 3, C]

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        sums = self.stats(outputs, targets)
        losses = self._losses(sums)  # [B, C]
        return (losses * (sums[:, 2] > 0)).sum(1) if self.present_only else losses.mean(1)

    def value(self, sums: Tensor, count: Tensor) -> Tensor:
        losses = self._losses(sums[None])[0]  # [C]
        return mean_of_present(losses, sums[2] > 0) if self.present_only else losses.mean()

    def mass(self, targets: Tensor) -> Tensor:
        if self.average == "batch" or not self.present_only:
            return torch.ones(len(targets), device=targets.device)
        if self.activation == "sigmoid":
            return present(targets).float().sum(1)
        # how many different classes an image holds: a step up in the sorted class numbers starts a class
        labels = targets.long()[..., None].flatten(1).sort(1).values
        starts = labels != torch.roll(labels, 1, 1)
        starts[:, 0] = True
        return (starts & (labels != IGNORED)).float().sum(1)

    def _losses(self, sums: Tensor) -> Tensor:
        return overlap_loss(sums, self.false_positive, self.false_negative, self.smooth)


def Dice(average: Literal["image", "batch"] = "image", smooth: float = 1.0, **settings) -> Tversky:
    """1 - (2 TP + s) / (P + T + s), P = sum p, T = sum t (Milletari et al. 2016, with P and T not squared).

    The Tversky loss with a = b = 1/2 and half the smoothing; its docstring has shapes, kinds and further settings.
    segmentation_models_pytorch 0.6 adds its smooth twice to numerator and denominator: half of it is the same loss.
    """
    return Tversky(0.5, 0.5, average, smooth / 2, **settings)


def Jaccard(average: Literal["image", "batch"] = "image", smooth: float = 1.0, **settings) -> Tversky:
    """1 - (TP + s) / (P + T - TP + s), the soft intersection over union (Rahman and Wang 2016).

    The Tversky loss with a = b = 1; its docstring has shapes, kinds and further settings.
    """
    return Tversky(1.0, 1.0, average, smooth, **settings)


def BCEDice(
    bce: float = 0.5,
    dice: float = 0.5,
    average: Literal["image", "batch"] = "image",
    smooth: float = 1.0,
    present_only: bool = False,
) -> Combined:
    """bce BCE + dice Dice over the pixels of masks [B, C, ...]; the winners of Understanding Clouds took .75 and .25.

    `present_only` leaves empty masks out of both: another head must then predict which classes are present.
    """
    return Weighted((BCE(present_only=present_only), bce), (Dice(average, smooth, present_only=present_only), dice))


@dataclass(frozen=True)
class LovaszHinge:
    """Lovasz extension of the Jaccard loss, at the errors max(0, 1 - z (2t - 1)) (Berman et al. 2018), mean over C.

    outputs, targets [B, C, ...], targets 0 or 1; NaN is ignored. A class without a target adds the largest hinge error
    of its background. Whole batch: the pixels of the batch are sorted together, each with the weight of its sample.
    `per_image` sorts every image by itself and takes the mean over images (per sample).
    """

    per_image: bool = False

    @property
    def kind(self) -> Kind:
        return "per_sample" if self.per_image else "whole_batch"

    def __call__(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        outputs, mask = full_precision(outputs), known(targets)
        targets = filled(targets, mask, outputs.dtype)
        errors = (1 - outputs * (2 * targets - 1)).relu()
        return lovasz(errors, targets, mask, weights, self.per_image)[0].mean(-1)


@dataclass(frozen=True)
class LovaszSoftmax:
    """Lovasz extension of the Jaccard loss, at the errors |1(t = c) - softmax(z)_c| (Berman et al. 2018).

    outputs [B, C, ...], targets [B, ...] class numbers, -100 is ignored. The mean over the classes that occur, in the
    batch (whole batch) or in each image with `per_image` (per sample); 0 where none does. `present_only=False` takes
    the mean over all C, where an absent class adds its largest probability.
    """

    per_image: bool = False
    present_only: bool = True

    @property
    def kind(self) -> Kind:
        return "per_sample" if self.per_image else "whole_batch"

    def __call__(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        probabilities, hot = softmax_pair(outputs, targets)
        mask = (targets.long() != IGNORED).unsqueeze(1)
        losses, there = lovasz((hot - probabilities).abs(), hot, mask, weights, self.per_image)
        return mean_of_present(losses, there) if self.present_only else losses.mean(-1)


def pixel_measure(like: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """The weight of every pixel: that of its sample, 0 outside the mask. [B, C, ...], a view where possible."""
    measure = torch.ones_like(like[:1, :1]) if mask is None else mask.to(like.dtype)
    if weights is not None:
        measure = measure * weights.to(like).reshape(-1, *[1] * (like.ndim - 1))
    return measure.expand_as(like)


def lovasz(
    errors: Tensor, targets: Tensor, mask: Tensor | None, weights: Tensor | None, per_image: bool
) -> tuple[Tensor, Tensor]:
    """The Lovasz extension of 1 - intersection / union, and whether there is a target at all, [B, C] or [C] both.

    errors, targets [B, C, ...]; pixels outside of `mask` do not count; a pixel of weight 2 counts like two pixels.
    Pixels are sorted by falling error; a pixel's factor is what it adds to the Jaccard loss of the pixels before it.
    """
    measure = pixel_measure(errors, mask, weights)
    errors, targets, measure = (_pixels(part, per_image) for part in (errors, targets, measure))
    order = errors.argsort(-1, descending=True)
    counted = (measure * targets).gather(-1, order), (measure * (1 - targets)).gather(-1, order)
    if errors.device.type != "mps" and errors.shape[-1] >= 2**24:  # float32 cannot count further than this
        counted = counted[0].double(), counted[1].double()
    hits, misses = counted[0].cumsum(-1), counted[1].cumsum(-1)
    wanted = hits[..., -1:]
    union = wanted + misses
    empty = union <= 0
    jaccard = torch.where(empty, 0.0, 1 - (wanted - hits) / torch.where(empty, 1.0, union))
    factors = torch.diff(jaccard, dim=-1, prepend=torch.zeros_like(jaccard[..., :1])).to(errors.dtype)
    return (errors.gather(-1, order) * factors).sum(-1), wanted[..., 0] > 0


def _pixels(tensor: Tensor, per_image: bool) -> Tensor:
    """[B, C, ...] -> [B, C, pixels], or [C, pixels of the batch]."""
    flat = tensor[..., None].flatten(2)
    return flat if per_image else flat.transpose(0, 1).flatten(1)
