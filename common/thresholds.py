"""Thresholds for labels [n, L], one per label, chosen on out-of-fold predictions."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Choose = Callable[[np.ndarray, np.ndarray], np.ndarray]  # scores, truth [n, L] -> thresholds [L]
UNKNOWN = 0.5  # the threshold of a label without a true row


def best_f_beta(scores: np.ndarray, truth: np.ndarray, beta: float = 1.0) -> np.ndarray:
    """The thresholds [L] with the highest F of every label, and so the highest macro F; tries all candidates.

    A threshold lies halfway between two scores. A label without a true row has no best one and gets 0.5.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked, hits = (np.take_along_axis(values, order, 0) for values in (np.asarray(scores, np.float64), truth > 0))
    found, true = np.arange(1, len(scores) + 1)[:, None], hits.sum(0)
    f = (1 + beta**2) * hits.cumsum(0) / (beta**2 * true + found)  # F of predicting the k highest scores, [n, L]
    least = ranked[-1:]
    below = np.concatenate([ranked[1:], np.where(least > 0, 0, least - 1)])  # so that all rows may be above
    f[ranked == below] = -1  # between equal scores there is no threshold
    best = f.argmax(0)[None]
    middle = (np.take_along_axis(ranked, best, 0) + np.take_along_axis(below, best, 0))[0] / 2
    return np.where(true > 0, middle, UNKNOWN)


def matching(scores: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The thresholds [L] above which a fraction `rates` [L] of the rows lies, so that a label is predicted as often."""
    ranked = -np.sort(-np.asarray(scores, np.float64), axis=0)
    count = np.clip(np.rint(rates * len(ranked)).astype(int), 0, len(ranked))
    ends = np.concatenate([ranked[:1] + 2, ranked, ranked[-1:] - 2])  # above all of them, and below
    columns = np.arange(ranked.shape[1])
    return (ends[count, columns] + ends[count + 1, columns]) / 2


def decide(scores: Tensor | np.ndarray, thresholds: Sequence[float]) -> Tensor:
    """bool [n, L]: the labels whose score is above the threshold, or else the one label that comes nearest to it."""
    scores = torch.as_tensor(scores)
    scores = scores.cpu() if scores.device.type == "mps" else scores  # Apple's GPUs have no float64
    above = scores.double() - torch.as_tensor(thresholds, dtype=torch.float64, device=scores.device)
    return (above > 0).scatter_(1, above.argmax(1, keepdim=True), True)
