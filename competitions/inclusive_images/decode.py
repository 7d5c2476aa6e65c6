"""From dense outputs back to labels: nearest rows, greedy pursuit of a sum, and how many labels to keep."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from competitions.inclusive_images.label_embedding import LabelEmbedding

ROWS_AT_ONCE = 512  # outputs scored at a time: their scores against 7,178 labels take 15 MB
GROUP = 16  # labels whose maximum stands for them before the exact choice


def nearest(
    embedding: LabelEmbedding,
    outputs: np.ndarray | Tensor,
    top_k: int,
    by: Literal["cosine", "projection"] = "cosine",
) -> tuple[np.ndarray, np.ndarray]:
    """Labels in falling order of cosine or projection: columns int64 [n, top_k] and scores float32 [n, top_k].

    Only labels with a vector are returned; an output of zeros has cosine 0 to all. Raises UserError when `top_k`
    exceeds the number of labels with a vector.
    """
    known = embedding.known
    if not 1 <= top_k <= len(known):
        raise UserError(f"top_k {top_k}: expected 1 to {len(known)}, the labels that have a vector")
    outputs = _checked(embedding, outputs)
    columns = torch.empty(len(outputs), top_k, dtype=torch.int64)
    cosines = torch.empty(len(outputs), top_k)
    directions = torch.from_numpy(embedding.unit_vectors if by == "cosine" else embedding.projections)
    padded = -(-len(known) // GROUP) * GROUP
    groups = padded // GROUP
    table = torch.zeros(padded, embedding.dim)
    table[: len(known)] = directions
    scores = torch.empty(ROWS_AT_ONCE, padded)  # one buffer: fresh memory costs more than the product
    for start in range(0, len(outputs), ROWS_AT_ONCE):
        rows = outputs[start : start + ROWS_AT_ONCE].float()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        part = torch.matmul(rows, table.T, out=scores[: len(rows)])
        part[:, len(known) :] = -2.0
        if top_k < groups // 4:
            # Label g + i * groups belongs to group g: the best top_k labels lie in the best top_k groups.
            best = part.view(-1, GROUP, groups).amax(1).topk(top_k, dim=1).indices  # [B, top_k]
            candidates = (best[:, None] + groups * torch.arange(GROUP)[:, None]).flatten(1)
            values, place = part.gather(1, candidates).topk(top_k, dim=1)
            found = candidates.gather(1, place)
        else:
            values, found = part.topk(top_k, dim=1)
        columns[start : start + len(rows)] = found
        cosines[start : start + len(rows)] = values
    return known[columns.numpy()], cosines.numpy()


def pursue(
    embedding: LabelEmbedding, outputs: np.ndarray | Tensor, limit: int = 20, least_gain: float = 0.05
) -> list[np.ndarray]:
    """Labels whose vectors add up to each output: columns of every output in the order they were found.

    A single row is a poor neighbour of a sum. Each step takes away the label that shortens the rest most
    (matching pursuit with coefficient 1), and then looks whether an earlier one can go; it ends when no label takes
    off `least_gain` of the output's squared length, or at `limit` labels. Outputs need the length of a sum.
    """
    known = embedding.known
    vectors = torch.from_numpy(embedding.vectors[known])
    squares = vectors.square().sum(1)
    found: list[np.ndarray] = []
    outputs = _checked(embedding, outputs)
    for start in range(0, len(outputs), ROWS_AT_ONCE):
        rest = outputs[start : start + ROWS_AT_ONCE].float().clone()
        threshold = least_gain * rest.square().sum(1).clamp_min(1e-12)
        taken = torch.zeros(len(rest), len(known), dtype=torch.bool)
        order = torch.full((len(rest), limit), -1)
        for step in range(limit):
            overlap = rest @ vectors.T
            # Gain of adding a label, or of taking one back out.
            gain = torch.where(taken, -2 * overlap - squares, 2 * overlap - squares)
            best_gain, label = gain.max(dim=1)
            active = torch.nonzero(best_gain > threshold).ravel()
            if not len(active):
                break
            chosen = label[active]
            sign = torch.where(taken[active, chosen], 1.0, -1.0)
            rest[active] += sign[:, None] * vectors[chosen]
            taken[active, chosen] = ~taken[active, chosen]
            order[active, step] = chosen
        for row in range(len(rest)):
            steps = dict.fromkeys(label for label in order[row].tolist() if label >= 0 and taken[row, label])
            found.append(known[list(steps)] if steps else np.empty(0, np.int64))
    return found


def calibrated_threshold(scores: np.ndarray, counts: np.ndarray) -> float:
    """The score above which as many labels lie as the images have: sum(scores >= t) = sum(counts).

    `scores` [n, k] of held-out images, at least as many as they have labels; `counts` [n] their true numbers.
    """
    wanted = int(np.sum(counts))
    if not 0 < wanted <= scores.size:
        raise UserError(
            f"{wanted} labels among {scores.size} scores: decode at least as many labels as the images have"
        )
    return float(np.partition(scores.ravel(), scores.size - wanted)[scores.size - wanted])


def counted(scores: np.ndarray, threshold: float, least: int = 1, most: int = 20) -> np.ndarray:
    """Labels to keep of every image, int [n], given its falling scores [n, k]."""
    return np.clip((scores >= threshold).sum(1), least, min(most, scores.shape[1]))


def _checked(embedding: LabelEmbedding, outputs: np.ndarray | Tensor) -> Tensor:
    outputs = torch.as_tensor(outputs)
    if outputs.ndim != 2 or outputs.shape[1] != embedding.dim:
        raise UserError(f"outputs of shape {tuple(outputs.shape)}: expected [n, {embedding.dim}], the embedding's size")
    if not bool(torch.isfinite(outputs).all()):
        raise UserError("an output is NaN or infinite: train with a lower --lr or with --clip-norm 1")
    return outputs
