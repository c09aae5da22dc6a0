"""A low-rank product as its singular values and subspaces, and how two of them lie to each other."""

# Shapes: O rows, D columns, R inner dimension, K rank (numerical); float64.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.lora.low_rank import decompose


@dataclass(frozen=True, slots=True, eq=False)
class LowRankSvd:
    """`u @ diag(sigma) @ v.T`, of full rank: directions that are zero up to rounding are left out."""

    u: Tensor  # [O, K]  orthonormal columns
    sigma: Tensor  # [K]  descending, positive
    v: Tensor  # [D, K]  orthonormal columns

    @property
    def rank(self) -> int:
        return len(self.sigma)

    @property
    def frobenius(self) -> float:
        return float(self.sigma.norm())

    @property
    def spectral(self) -> float:
        return float(self.sigma[0]) if self.rank else 0.0

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of `sigma` normalised to sum 1: K if all are equal, 1 if one outweighs the rest.

        Source: Roy & Vetterli 2007. 0 for a product of zero.
        """
        if not self.rank:
            return 0.0
        share = self.sigma / self.sigma.sum()
        return float(torch.exp(-(share * share.log()).sum()))


def svd_of(b: Tensor, a: Tensor) -> LowRankSvd:  # [O, R], [R, D]
    """Decompose `b @ a` without forming it."""
    u, sigma, v_t = decompose(b, a)
    # Of the factors and not of the product: a sum that cancels leaves rounding of the size of its terms.
    noise = float(b.norm() * a.norm()) * torch.finfo(sigma.dtype).eps
    kept = int((sigma > noise).sum())
    return LowRankSvd(u[:, :kept], sigma[:kept], v_t[:kept].T)


def inner_product(first: LowRankSvd, second: LowRankSvd) -> float:
    """The sum of the products of entries of both: `trace(first^T second)`.

    Equal to `tr((b_1^T b_2)(a_2 a_1^T))` for products b a, and taken from the orthonormal factors, since each entry of
    `u_1^T u_2` and `v_1^T v_2` is a cosine and nothing overflows.
    """
    cosines = (first.u.T @ second.u) * (first.v.T @ second.v)  # [K1, K2]
    return float(first.sigma @ cosines @ second.sigma)


def overlap(basis: Tensor, other: Tensor) -> float:  # [n, p], [n, q], orthonormal columns
    """`||basis^T other||_F^2 / min(p, q)`: the share of the smaller subspace that lies in the other, 0 to 1."""
    return float((basis.T @ other).square().sum()) / min(basis.shape[1], other.shape[1])


def expected_overlap(n: int, p: int, q: int) -> float:
    """The expectation of `overlap` for random subspaces of R^n of dimensions p and q: `(p q / n) / min(p, q)`."""
    return max(p, q) / n
