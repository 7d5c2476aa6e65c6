"""Dense vectors for labels whose inner products are the pointwise mutual information of the labels.

The idea is word2vec's in its matrix form (Levy and Goldberg, 2014): count how often two labels share an image, take
the logarithm of that over chance, and factor the symmetric matrix. Three choices decide whether it works:

- the diagonal, a label's information about itself -ln p, stays. Without it the matrix has trace 0, half of its
  spectrum is negative, and no real vectors have such inner products;
- negative values become 0 (PPMI): few pairs were seen often enough to say that they avoid one another;
- `smoothing` adds as many imagined images to the observed and to the expected count of every pair, so that one
  shared image of two rare labels is not the strongest relation of all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from common import checkpoint
from common.errors import UserError
from competitions.inclusive_images.spectrum import leading_eigenpairs


@dataclass(frozen=True)
class LabelEmbedding:
    """`vectors` float32 [m, dim]; rows of labels that were never seen, or say nothing, are zero and never decoded.

    `eigenvalues` [dim] in falling order; when dim exceeds the number of usable ones (`rank`), the last columns are 0.
    """

    vectors: np.ndarray
    eigenvalues: np.ndarray
    counts: np.ndarray  # [m] images of every label
    kind: str

    @classmethod
    def fit(
        cls,
        labels: csr_matrix,
        dim: int,
        kind: Literal["ppmi", "pmi"] = "ppmi",
        diagonal: bool = True,
        shift: float = 0.0,
        smoothing: float = 0.3,
        seed: int = 0,
    ) -> "LabelEmbedding":
        """Factor the co-occurrence of `labels` [n, m] (0 and 1) into vectors of `dim` numbers.

        kind "ppmi" factors max(0, ln((C + smoothing) / (expected + smoothing)) - shift) by its positive eigenvalues;
        "pmi" is the factorisation that the competition's blog describes: diagonal 0, negative values kept, pairs
        never seen 0, singular value decomposition (the other settings do not apply).
        Raises UserError when no label occurs or no two differ, as with all images alike.
        """
        if dim < 1 or smoothing < 0:
            raise UserError(f"dim {dim}, smoothing {smoothing}: expected dim of 1 or more and smoothing of 0 or more")
        counts = np.asarray((labels != 0).sum(axis=0)).ravel().astype(np.int64)
        seen = np.flatnonzero(counts)
        if not len(seen):
            raise UserError("no image has a label, so there is nothing to embed: expected a matrix with labels")
        matrix = torch.from_numpy(
            pmi(labels[:, seen]) if kind == "pmi" else ppmi(labels[:, seen], diagonal, shift, smoothing)
        )
        if not bool(matrix.any()):
            raise UserError(
                "the labels hold no mutual information (all images alike, or a shift above all of it): "
                "train without the embedding head, --embedding-dim 0"
            )
        values, directions = leading_eigenpairs(matrix, min(dim, len(seen)), by_magnitude=kind == "pmi", seed=seed)
        sizes = values.abs() if kind == "pmi" else values.clamp_min(0)
        sizes = torch.where(sizes > 1e-6 * sizes.max(), sizes, 0.0)
        vectors = np.zeros((labels.shape[1], dim), np.float32)
        vectors[seen, : len(sizes)] = (directions * sizes.sqrt()).float().numpy()
        eigenvalues = np.zeros(dim, np.float32)
        eigenvalues[: len(sizes)] = torch.where(sizes > 0, values, 0.0).float().numpy()
        return cls(vectors, eigenvalues, counts, kind)

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    @property
    def rank(self) -> int:
        """Columns that are not zero."""
        return int(np.count_nonzero(self.eigenvalues))

    @property
    def known(self) -> np.ndarray:
        """Columns of the labels that have a vector; everything decoded is one of them."""
        return np.flatnonzero(np.square(self.vectors).sum(1) > 1e-12)

    @property
    def unit_vectors(self) -> np.ndarray:
        """float32 [known, dim], of length 1: the rows of `known`."""
        vectors = self.vectors[self.known]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode(self, labels: csr_matrix) -> np.ndarray:
        """The sum of each image's label vectors, float32 [n, dim]; an image without known labels is a zero row."""
        return np.asarray(labels.astype(np.float32) @ self.vectors, dtype=np.float32)

    def decode(self, outputs: np.ndarray | Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `top_k` labels nearest to every output by cosine: columns int64 [n, top_k] and scores [n, top_k]."""
        from competitions.inclusive_images.decode import nearest

        return nearest(self, outputs, top_k)

    def save(self, path: Path) -> None:
        arrays = {"vectors": self.vectors, "eigenvalues": self.eigenvalues, "counts": self.counts}
        checkpoint.save(path, {name: torch.from_numpy(array) for name, array in arrays.items()} | {"kind": self.kind})

    @classmethod
    def load(cls, path: Path) -> "LabelEmbedding":
        """What `save` wrote; raises UserError when the file is damaged or something else."""
        found = checkpoint.load(path)
        if set(found) != {"vectors", "eigenvalues", "counts", "kind"}:
            raise UserError(f"{path} holds {', '.join(sorted(found))}, no label embedding: delete it and train again")
        return cls(*(found[name].numpy() for name in ("vectors", "eigenvalues", "counts")), found["kind"])


def co_occurrence(labels: csr_matrix) -> csr_matrix:
    """Images that two labels share, float32 [m, m]; a label's own count on the diagonal."""
    ones = csr_matrix((np.ones(labels.nnz, np.float32), labels.indices, labels.indptr), shape=labels.shape)
    return ones.T.tocsr() @ ones


def ppmi(labels: csr_matrix, diagonal: bool = True, shift: float = 0.0, smoothing: float = 0.0) -> np.ndarray:
    """max(0, ln((C + s) / (c_i c_j / n + s)) - shift), float32 [m, m], dense because the products are faster so."""
    shared = co_occurrence(labels)
    counts = shared.diagonal()
    rows = np.repeat(np.arange(len(counts)), np.diff(shared.indptr))
    # Only pairs that were seen can be above chance, so everything stays sparse up to the last line.
    expected = counts[rows] * (counts / np.float32(labels.shape[0]))[shared.indices]
    values = np.log((shared.data + np.float32(smoothing)) / (expected + np.float32(smoothing))) - np.float32(shift)
    np.maximum(values, 0, out=values)
    if not diagonal:
        values[rows == shared.indices] = 0
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


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    """Exactly symmetric, in place: rounding differs by a bit between the two orders of a product."""
    for start in range(0, len(matrix), 512):
        rows = slice(start, start + 512)
        matrix[rows, start:] = np.minimum(matrix[rows, start:], matrix[start:, rows].T)
        matrix[start:, rows] = matrix[rows, start:].T
    return matrix
