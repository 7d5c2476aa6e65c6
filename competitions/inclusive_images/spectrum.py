"""The leading eigenvectors of a symmetric matrix: block Lanczos in float32, finished in float64."""

import torch
from torch import Tensor

BLOCK = 32  # columns multiplied at once; narrow blocks reach a higher Krylov degree with as many products
GUARD = 128  # extra eigenpairs, so that the last requested ones are as accurate as the first
SMALL = 1200  # up to this order the whole spectrum in float64 takes a second
ROWS_AT_ONCE = 512  # rows converted to float64 at a time
TOLERANCE, RESTARTS = 5e-6, 2  # restarts until the residuals are that small, relative to the largest eigenvalue


def leading_eigenpairs(matrix: Tensor, count: int, by_magnitude: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Largest (or largest in magnitude) eigenvalues [count] and their eigenvectors [m, count] of `matrix` [m, m].

    float32 in, float64 out. Equal input gives equal bits for an equal number of threads. In every vector the entry of
    largest magnitude is positive. Memory besides the matrix: 4 (2 count + 1.5 GUARD + ...) floats a row, 130 MB for
    7,178 rows and count 512.
    """
    order, kept = len(matrix), min(count + GUARD, len(matrix))
    size = -(-max(3 * kept, kept + 8 * BLOCK) // BLOCK) * BLOCK  # of the Krylov basis
    if order <= max(SMALL, size):
        values, vectors = torch.linalg.eigh(matrix.double())
        chosen = _chosen(values, count, by_magnitude)
        return values[chosen], _signed(vectors[:, chosen])
    vectors = _lanczos(matrix, count, kept, size, by_magnitude, seed)
    return _refined(matrix, vectors, count, by_magnitude)


def _lanczos(matrix: Tensor, count: int, kept: int, size: int, by_magnitude: bool, seed: int) -> Tensor:
    """Orthonormal columns float32 [m, kept] that span the leading eigenvectors: block Krylov basis, thick restarts."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.empty(size, len(matrix)).T  # [m, size], columns contiguous
    image = torch.empty(size, len(matrix)).T  # matrix @ basis
    block = torch.randn(len(matrix), BLOCK, generator=generator)
    used = 0
    for _ in range(1 + RESTARTS):
        while used + BLOCK <= size:
            block = _outside(basis[:, :used], block)
            basis[:, used : used + BLOCK] = block
            block = matrix @ block
            image[:, used : used + BLOCK] = block
            used += BLOCK
        block = _outside(basis[:, :used], block)  # before the basis is cut: dropped directions must not come back
        projected = basis[:, :used].T @ image[:, :used]
        values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        chosen = _chosen(values, kept, by_magnitude)
        values, rotation = values[chosen], rotation[:, chosen]
        vectors, images = basis[:, :used] @ rotation, image[:, :used] @ rotation
        residual = (images - vectors * values).norm(dim=0)[:count].max() / values.abs().max().clamp_min(1e-30)
        if residual < TOLERANCE:
            break
        basis[:, :kept], image[:, :kept], used = vectors, images, kept
    return vectors


def _refined(matrix: Tensor, vectors: Tensor, count: int, by_magnitude: bool) -> tuple[Tensor, Tensor]:
    """Rayleigh-Ritz in float64 within span(vectors), because float32 mixes eigenvectors of close eigenvalues."""
    vectors = torch.linalg.qr(vectors.double())[0]
    rows = range(0, len(matrix), ROWS_AT_ONCE)
    image = torch.cat([matrix[start : start + ROWS_AT_ONCE].double() @ vectors for start in rows])
    projected = vectors.T @ image
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    chosen = _chosen(values, count, by_magnitude)
    return values[chosen], _signed(vectors @ rotation[:, chosen])


def _outside(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns for the part of `block` outside span(basis); done twice, as once leaves rounding errors."""
    for _ in range(2):
        if basis.shape[1]:
            block = block - basis @ (basis.T @ block)
        block = _orthonormal(block)
    return block


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormal columns by Cholesky QR, one pass over the tall block; by Householder QR if that breaks down."""
    block = block / block.norm(dim=0).clamp_min(1e-30)
    factor, failed = torch.linalg.cholesky_ex((block.T @ block).double())
    if failed or factor.diagonal().min() < 1e-3:
        return torch.linalg.qr(block)[0]
    return torch.linalg.solve_triangular(factor.T.float(), block, upper=True, left=False)


def _chosen(values: Tensor, count: int, by_magnitude: bool) -> Tensor:
    return torch.argsort(values.abs() if by_magnitude else values, descending=True, stable=True)[:count]


def _signed(vectors: Tensor) -> Tensor:
    """Each column with its entry of largest magnitude positive."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
