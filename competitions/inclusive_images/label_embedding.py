"""Dense label vectors whose inner products approximate the pointwise mutual information (PMI) of the labels.

This is word2vec in its matrix form (Levy and Goldberg, 2014): count the images that two labels share, take the
logarithm of this count over the one expected by chance, and factor the symmetric matrix. Three choices make it work:

- the diagonal, -ln p of a label, is kept. Without it the matrix has trace 0 and its spectrum is half negative, so no
  real vectors have such inner products;
- negative values become 0 (PPMI), as few pairs of labels are frequent enough to show that they avoid each other;
- `smoothing` adds this many imagined images to the observed and to the expected count of every pair, so that one
  shared image of two rare labels is not the strongest relation of all. Labels with fewer than `least_images` get no
  vector: cut to `dim` numbers, its direction would depend on the few images with the label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from common.errors import UserError
from competitions.inclusive_images.spectrum import leading_eigenpairs


@dataclass(frozen=True)
class LabelEmbedding:
    """`vectors` float32 [m, dim]; rows are zero for labels that are too rare or carry no information.

    The columns belong to falling eigenvalues; if dim exceeds the number of usable ones, the last columns are 0.
    `lengths` [m] are the lengths that the vectors would have if no eigenvalue were cut off.
    """

    vectors: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray  # [m] images of every label

    @classmethod
    def fit(
        cls,
        labels: csr_matrix,
        dim: int,
        kind: Literal["ppmi", "pmi"] = "ppmi",
        smoothing: float = 3.0,
        least_images: int | None = None,
        seed: int = 0,
    ) -> "LabelEmbedding":
        """Factor the co-occurrence of `labels` [n, m] (0 and 1) into vectors of `dim` numbers.

        kind "ppmi" factors max(0, ln((C + smoothing) / (expected + smoothing))) by its positive eigenvalues.
        "pmi" is the factorisation of the competition's blog: diagonal 0, negative values kept, 0 for pairs that never
        occur, singular value decomposition, all labels that occur (smoothing and least_images do not apply).
        `least_images` defaults to log10(n), rounded down, but at least 1: 6 for the competition's 1.7 million images.
        Raises UserError if no label occurs in enough images, or if the labels carry no information because all images
        are alike.
        """
        counts = np.asarray(labels.sum(axis=0, dtype=np.int64)).ravel()
        if least_images is None:
            least_images = int(np.log10(max(1, labels.shape[0])))
        least_images = 1 if kind == "pmi" else max(1, least_images)
        seen = np.flatnonzero(counts >= least_images)
        if not len(seen):
            raise UserError(
                f"no label has {least_images} of the {labels.shape[0]} images (the most frequent has {counts.max()}): "
                f"add labels, or train without the embedding head, --embedding 0 --clusters 0"
            )
        matrix = torch.from_numpy(pmi(labels[:, seen]) if kind == "pmi" else ppmi(labels[:, seen], smoothing))
        if not bool(matrix.any()):
            raise UserError(
                "the labels hold no mutual information (all images alike): "
                "train without the embedding head, --embedding 0 --clusters 0"
            )
        lengths = np.zeros(len(counts), np.float32)
        lengths[seen] = _lengths(matrix, kind)
        values, directions = leading_eigenpairs(matrix, min(dim, len(seen)), by_magnitude=kind == "pmi", seed=seed)
        sizes = values.abs() if kind == "pmi" else values.clamp_min(0)
        sizes = torch.where(sizes > 1e-6 * sizes.max(), sizes, 0.0)
        vectors = np.zeros((labels.shape[1], dim), np.float32)
        vectors[seen, : len(sizes)] = (directions * sizes.sqrt()).float().numpy()
        return cls(vectors, lengths, counts)

    @property
    def known(self) -> np.ndarray:
        """Columns of the labels that have a vector."""
        return np.flatnonzero(np.square(self.vectors).sum(1) > 1e-12)

    @property
    def unit_vectors(self) -> np.ndarray:
        """`units` of the `known` labels, float32 [known, dim]."""
        return self.units(self.known)

    def units(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        """The vectors of `labels` scaled to length 1, float32 [labels, dim]; all of them must be `known`."""
        vectors = self.vectors[labels]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    @property
    def projections(self) -> np.ndarray:
        """The vectors of the `known` labels divided by their lengths before the cut, float32 [known, dim].

        If the cut to dim numbers left a tenth of a vector, a cosine to it is mostly noise, but its projection is small.
        So projections rank labels better than cosines; without a cut both are equal.
        """
        known = self.known
        own = np.linalg.norm(self.vectors[known], axis=1)
        return self.vectors[known] / np.maximum(own, self.lengths[known])[:, None]


def co_occurrence(labels: csr_matrix) -> csr_matrix:
    """Number of images that two labels share, float32 [m, m]; the diagonal has the count of each label."""
    ones = csr_matrix((np.ones(labels.nnz, np.float32), labels.indices, labels.indptr), shape=labels.shape)
    return ones.T.tocsr() @ ones


def ppmi(labels: csr_matrix, smoothing: float = 0.0) -> np.ndarray:
    """max(0, ln((C + s) / (c_i c_j / n + s))), float32 [m, m]; dense, because matrix products are then faster."""
    shared = co_occurrence(labels)
    counts = shared.diagonal()
    rows = np.repeat(np.arange(len(counts)), np.diff(shared.indptr))
    # Only pairs that occur can be above chance, so everything is sparse up to the last line.
    expected = counts[rows] * (counts / np.float32(labels.shape[0]))[shared.indices]
    values = np.log((shared.data + np.float32(smoothing)) / (expected + np.float32(smoothing)))
    shared.data = np.maximum(values, 0)
    return _symmetric(shared.toarray())


def pmi(labels: csr_matrix) -> np.ndarray:
    """ln((C / n) / (c_i c_j / n^2)) with diagonal 0 and 0 for pairs never seen, float32 [m, m]: the blog's matrix."""
    shared = co_occurrence(labels)
    counts = shared.diagonal().astype(np.float64)
    rows = np.repeat(np.arange(len(counts)), np.diff(shared.indptr))
    values = np.log(shared.data * labels.shape[0] / (counts[rows] * counts[shared.indices]))
    values[rows == shared.indices] = 0
    shared.data = values.astype(np.float32)
    return _symmetric(shared.toarray())


def _lengths(matrix: Tensor, kind: str) -> np.ndarray:
    """Length of every row of E if E E' were the whole matrix: the root of its diagonal, or for "pmi" of |matrix|'s.

    The exact diagonal of |matrix| needs the whole spectrum; the norms of the rows are a close enough upper bound.
    """
    if kind == "pmi":
        return matrix.norm(dim=1).sqrt().numpy()
    return matrix.diagonal().clamp_min(0).sqrt().numpy()


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    """Make the matrix exactly symmetric, in place; the two orders of a product can round differently."""
    for start in range(0, len(matrix), 512):
        rows = slice(start, start + 512)
        matrix[rows, start:] = np.minimum(matrix[rows, start:], matrix[start:, rows].T)
        matrix[start:, rows] = matrix[rows, start:].T
    return matrix
