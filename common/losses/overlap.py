"""The sums that F-beta, Dice, Jaccard and Tversky share: true positives, predicted mass, target mass."""

import torch
from torch import Tensor

from common.losses.missing import filled, known
from common.losses.protocol import full_precision

IGNORED = -100  # class number of an ignored pixel, torch's default


def sigmoid_pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and targets of independent classes, both 0 where the target is NaN. [B, C, ...] each"""
    probabilities, mask = full_precision(outputs).sigmoid(), known(targets)
    if mask is not None:
        probabilities = torch.where(mask, probabilities, 0.0)
    return probabilities, filled(targets, mask, probabilities.dtype)


def softmax_pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and one-hot targets of exclusive classes, 0 where the target is ignored. [B, C, ...], [B, ...]"""
    probabilities = full_precision(outputs).softmax(1)
    targets = targets.long()  # of any integer type; in uint8, -100 is 156
    mask = (targets == IGNORED).unsqueeze(1)
    labels = targets.masked_fill(targets == IGNORED, 0).unsqueeze(1)
    hot = torch.zeros_like(probabilities).scatter_(1, labels, 1.0)
    return probabilities.masked_fill(mask, 0.0), hot.masked_fill(mask, 0.0)


def overlap_sums(probabilities: Tensor, targets: Tensor) -> Tensor:
    """TP = sum p t, P = sum p and T = sum t over the pixels of every sample and class. [B, C, ...] -> [B, 3, C]"""
    sums = [probabilities * targets, probabilities, targets]
    if probabilities.ndim > 2:  # labels of an image need no sum, and a small network's step saves the operation
        sums = [part.flatten(2).sum(2) for part in sums]
    return torch.stack(sums, 1)


def overlap_loss(sums: Tensor, false_positive: float, false_negative: float, smooth: float) -> Tensor:
    """1 - (TP + s) / (TP + a FP + b FN + s), FP = P - TP, FN = T - TP, axis 1 = (TP, P, T). [N, 3, ...] -> [N, ...]

    Loss and gradient are 0 where prediction, target and s are 0, and also where the denominator is a denormal number,
    which would make the gradient infinite.
    """
    hits, predicted, wanted = sums.unbind(1)
    total = hits + false_positive * (predicted - hits) + false_negative * (wanted - hits) + smooth
    empty = total < torch.finfo(total.dtype).tiny
    return torch.where(empty, 0.0, 1 - (hits + smooth) / torch.where(empty, 1.0, total))


def mean_of_present(losses: Tensor, present: Tensor) -> Tensor:
    """The mean over the classes that are present, 0 where none is. [..., C] -> [...]"""
    return (losses * present).sum(-1) / present.sum(-1).clamp(min=1)
