"""Dense vectors for labels whose inner products are the pointwise mutual information of the labels.

The idea is word2vec's in its matrix form (Levy and Goldberg, 2014): count how often two labels share an image, take
the logarithm of that over chance, and factor the symmetric matrix. Three choices decide whether it works:

- the diagonal, a label's information about itself -ln p, stays. Without it the matrix has trace 0, half of its
  spectrum is negative, and no real vectors have such inner products;
- negative values become 0 (PPMI): few pairs were seen often enough to say that they avoid one another;
- `smoothing` adds as many imagined images to the observed and to the expected count of every pair, so that one
  shared image of two rare labels is not the strongest relation of all; labels with fewer than `least_images` get no
  vector: after the cut to `dim` numbers they would point wherever the few images that hold them happen to.
"""

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
    """`vectors` float32 [m, dim]; rows of labels that were never seen, or say nothing, are zero and never found.

    `eigenvalues` [dim] in falling order; when dim exceeds the number of usable ones, the last columns are 0.
    `lengths` [m] are those that the vectors would have if no eigenvalue were cut off.
    """

    vectors: np.ndarray
    eigenvalues: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray  # [m] images of every label
    kind: str

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

        kind "ppmi" factors max(0, ln((C + smoothing) / (expected + smoothing))) by its positive eigenvalues;
        "pmi" is the factorisation that the competition's blog describes: diagonal 0, negative values kept, pairs
        never seen 0, singular value decomposition, all labels that occur (the other settings do not apply).
        `least_images` defaults to log10(n), rounded down, and 1 at least: 6 for the competition's 1.7 million.
        Raises UserError when no label occurs or no two differ, as with all images alike.
        """
        if dim < 1 or smoothing < 0:
            raise UserError(f"dim {dim}, smoothing {smoothing}: expected dim of 1 or more and smoothing of 0 or more")
        if (labels.data == 0).any():  # stored zeros are no labels
            labels = labels.copy()
            labels.eliminate_zeros()
        counts = np.asarray((labels != 0).sum(axis=0)).ravel().astype(np.int64)
        if not counts.any():
            raise UserError("no image has a label, so there is nothing to embed: expected a matrix with labels")
        if least_images is None:
            least_images = int(np.log10(labels.shape[0]))
        seen = np.flatnonzero(counts >= (1 if kind == "pmi" else max(1, least_images)))
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
        eigenvalues = np.zeros(dim, np.float32)
        eigenvalues[: len(sizes)] = torch.where(sizes > 0, values, 0.0).float().numpy()
        return cls(vectors, eigenvalues, lengths, counts, kind)

    @property
    def known(self) -> np.ndarray:
        """Columns of the labels that have a vector."""
        return np.flatnonzero(np.square(self.vectors).sum(1) > 1e-12)

    @property
    def unit_vectors(self) -> np.ndarray:
        """float32 [known, dim], of length 1: the rows of `known`."""
        vectors = self.vectors[self.known]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    @property
    def projections(self) -> np.ndarray:
        """float32 [known, dim]: the rows of `known` divided by their uncut lengths, at most of length 1.

        The cosine to a vector of which the cut left a tenth is mostly noise; its projection stays small. So labels
        rank better by projections, and equally when nothing was cut.
        """
        known = self.known
        own = np.linalg.norm(self.vectors[known], axis=1)
        return self.vectors[known] / np.maximum(own, self.lengths[known])[:, None]


def co_occurrence(labels: csr_matrix) -> csr_matrix:
    """Images that two labels share, float32 [m, m]; a label's own count on the diagonal."""
    ones = csr_matrix((np.ones(labels.nnz, np.float32), labels.indices, labels.indptr), shape=labels.shape)
    return ones.T.tocsr() @ ones


def ppmi(labels: csr_matrix, smoothing: float = 0.0) -> np.ndarray:
    """max(0, ln((C + s) / (c_i c_j / n + s))), float32 [m, m], dense because the products are faster so."""
    shared = co_occurrence(labels)
    counts = shared.diagonal()
    rows = np.repeat(np.arange(len(counts)), np.diff(shared.indptr))
    # Only pairs that were seen can be above chance, so everything stays sparse up to the last line.
    expected = counts[rows] * (counts / np.float32(labels.shape[0]))[shared.indices]
    values = np.log((shared.data + np.float32(smoothing)) / (expected + np.float32(smoothing)))
    np.maximum(values, 0, out=values)
    return _symmetric(csr_matrix((values, shared.indices, shared.indptr), shape=shared.shape).toarray())


def pmi(labels: csr_matrix) -> np.ndarray:
    """ln((C / n) / (c_i c_j / n^2)) with diagonal 0 and 0 for pairs never seen, float32 [m, m]: the blog's matrix."""
    shared = co_occurrence(labels)
    counts = shared.diagonal().astype(np.float64)
    rows = np.repeat(np.arange(len(counts)), np.diff(shared.indptr))
    values = np.log(shared.data * labels.shape[0] / (counts[rows] * counts[shared.indices]))
    values[rows == shared.indices] = 0
    return _symmetric(
        csr_matrix((values.astype(np.float32), shared.indices, shared.indptr), shape=shared.shape).toarray()
    )


def _lengths(matrix: Tensor, kind: str) -> np.ndarray:
    """Length of every row of E if E E' were the whole matrix: the root of its diagonal, or of |matrix|'s for "pmi".

    The diagonal of |matrix| would need the whole spectrum; its rows' lengths are an upper bound that is near enough.
    """
    if kind == "pmi":
        return matrix.norm(dim=1).sqrt().numpy()
    return matrix.diagonal().clamp_min(0).sqrt().numpy()


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    """Exactly symmetric, in place: rounding differs by a bit between the two orders of a product."""
    for start in range(0, len(matrix), 512):
        rows = slice(start, start + 512)
        matrix[rows, start:] = np.minimum(matrix[rows, start:], matrix[start:, rows].T)
        matrix[start:, rows] = matrix[rows, start:].T
    return matrix
