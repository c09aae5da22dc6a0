"""Low-rank products B A: norm, distance, singular values, the nearest product of a smaller rank. Knows no adapter."""

# Shapes: O rows, D columns, R inner dimension; all in float64.

from __future__ import annotations

import torch
from torch import Tensor

SVD_OVERSAMPLING = 8
SVD_ITERATIONS = 6


def product_norm(b: Tensor, a: Tensor) -> float:  # [O, R], [R, D]
    """The Frobenius norm of `b @ a`, without forming it. O((O + D) R^2).

    From QR and not from the trace of (b^T b)(a a^T): that squares, and would lose norms below 1e-8 of the factors'.
    """
    r_b = torch.linalg.qr(b, mode="r").R
    r_a = torch.linalg.qr(a.T, mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def product_distance(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """The Frobenius norm of the difference of two products (b, a), without forming either."""
    b = torch.cat([left[0], -right[0]], dim=1)
    a = torch.cat([left[1], right[1]], dim=0)
    return product_norm(b, a)


def truncate(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation of `b @ a` of at most `rank` (Eckart-Young).

    Never forms the product: the SVD is of the R x R core between the orthogonal bases of b and of a. Directions
    that are zero up to rounding are dropped, so the rank may be smaller. Both factors get the root of each
    singular value.
    """
    return _balanced(*decompose(b, a), rank)


def decompose(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [O, R], [R, D]
    """Return the singular value decomposition u, sigma, v_t of `b @ a`, without forming it. O((O + D) R^2)."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, sigma, v_t @ q_a.T


def factorise(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of at most `rank` whose product is near `dense` [O, D]: its truncated SVD.

    Randomised subspace iteration, with a seed of its own: exact where `dense` has such a rank, and else so near
    the best approximation that the difference does not matter beside what truncation loses.
    """
    num_probes = min(rank + SVD_OVERSAMPLING, *dense.shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            0
        )  # torch.manual_seed would also seed, and not restore, the GPUs
        u, sigma, v = torch.svd_lowrank(dense, q=num_probes, niter=SVD_ITERATIONS)
    return _balanced(u, sigma, v.T, rank)


def _balanced(u: Tensor, sigma: Tensor, v_t: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    noise = sigma[0] * torch.finfo(sigma.dtype).eps * max(u.shape[0], v_t.shape[1])
    kept = max(1, min(rank, int((sigma > noise).sum())))
    root = sigma[:kept].sqrt()
    return u[:, :kept] * root, root[:, None] * v_t[:kept]
