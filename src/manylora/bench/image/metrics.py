"""Distances between sets of pictures, and what single pictures are worth: pure functions of feature arrays.

Knows no picture, network or file. Estimates here are of one sample; their intervals are `image_intervals`.
"""

# Shapes: N pictures of one set, M of another, D features, K names; float64 inside whatever comes in.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manylora.errors import ConfigError

Array = NDArray[np.float64]


def polynomial_kernel(x: ArrayLike, y: ArrayLike) -> Array:
    """Return k(x_i, y_j) = (x_i . y_j / D + 1)^3 as [N, M], of features [N, D] and [M, D].

    Source:
        Demystifying MMD GANs (Binkowski et al. 2018), section 3.1.
    """
    x, y = features_of(x), features_of(y)
    if x.shape[1] != y.shape[1]:
        raise ConfigError(f"two sets of features must be equally wide, got {x.shape[1]} and {y.shape[1]}")
    kernel: Array = (x @ y.T / x.shape[1] + 1.0) ** 3
    return kernel


def mmd2(kernel_xx: Array, kernel_xy: Array, kernel_yy: Array) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy; it can be negative.

    Args:
        kernel_xx: [N, N], kernel_xy: [N, M], kernel_yy: [M, M].
    Source:
        A kernel two-sample test (Gretton et al. 2012), lemma 6: no picture is compared with itself.
    """
    return mean_off_diagonal(kernel_xx) + mean_off_diagonal(kernel_yy) - 2.0 * float(kernel_xy.mean())


def mean_off_diagonal(kernel: Array) -> float:
    """Return the mean of a square [N, N] without its diagonal."""
    num = len(kernel)
    if num < 2:
        raise ConfigError(f"a set must have at least 2 pictures to be compared, got {num}")
    return float((kernel.sum() - np.trace(kernel)) / (num * (num - 1)))


def kid(x: ArrayLike, y: ArrayLike) -> float:
    """Return the kernel inception distance of features [N, D] and [M, D]: unbiased, 0 in the mean for equal laws.

    It uses all pictures at once, which has less variance than the mean over subsets (`kid_of_subsets`), the same
    expectation, and is affordable at some thousand pictures.
    """
    return mmd2(polynomial_kernel(x, x), polynomial_kernel(x, y), polynomial_kernel(y, y))


def kid_of_subsets(
    x: ArrayLike, y: ArrayLike, *, subset_size: int, num_subsets: int = 100, seed: int = 0
) -> float:
    """Return KID as most programs report it: the mean over random subsets of `subset_size` from each set.

    Source:
        Demystifying MMD GANs (Binkowski et al. 2018), section 4.
    """
    x, y = features_of(x), features_of(y)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ConfigError(f"subset_size must lie in [2, {min(len(x), len(y))}], got {subset_size}")
    draw = np.random.default_rng(seed)
    subsets = (
        [features[draw.choice(len(features), subset_size, replace=False)] for features in (x, y)]
        for _ in range(num_subsets)
    )
    return float(np.mean([kid(*pair) for pair in subsets]))


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """Return the squared 2-Wasserstein distance of the Gaussians that have the moments of [N, D] and [M, D].

    |mean_x - mean_y|^2 + trace(C_x + C_y - 2 (C_x C_y)^(1/2)). Biased upwards, by about a constant over N: compare
    only sets of equal size, and see `frechet_extrapolated`.

    Source:
        GANs trained by a two time-scale update rule (Heusel et al. 2017), equation 6.
    """
    x, y = features_of(x), features_of(y)
    return gaussian_distance(x.mean(0), covariance(x), y.mean(0), covariance(y))


def gaussian_distance(mean_x: Array, cov_x: Array, mean_y: Array, cov_y: Array) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians, means [D] and covariances [D, D]."""
    # C_x C_y has the eigenvalues of the symmetric C_x^(1/2) C_y C_x^(1/2), so no complex square root is needed.
    root = square_root(cov_x)
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(min=0.0)).sum()
    away = mean_x - mean_y
    return float(away @ away + np.trace(cov_x) + np.trace(cov_y) - 2.0 * shared)


def frechet_extrapolated(
    x: ArrayLike, y: ArrayLike, *, groups: ArrayLike | None = None, num_halves: int = 16, seed: int = 0
) -> float:
    """Return the Frechet distance with the first order of its bias in 1 / N taken off: 2 FD(N) - FD(N / 2).

    Args:
        x: [N, D], the set that is small; y: [M, D], taken as it is, so the bias that M brings stays.
        groups: [N], which pictures belong together (one prompt): they stay together in a half.
    Source:
        Effectively unbiased FID (Chong & Forsyth 2020), with two points for the line.
    """
    x, y = features_of(x), features_of(y)
    group = np.arange(len(x)) if groups is None else np.asarray(groups)
    names, draw = np.unique(group), np.random.default_rng(seed)
    if len(names) < 4:
        raise ConfigError(f"half of a set needs at least 2 groups of pictures, got {len(names)} in all")
    chosen = (draw.choice(names, len(names) // 2, replace=False) for _ in range(num_halves))
    of_halves = [frechet_distance(x[np.isin(group, half)], y) for half in chosen]
    return 2.0 * frechet_distance(x, y) - float(np.mean(of_halves))


def covariance(x: Array) -> Array:
    """Return the unbiased covariance [D, D] of features [N, D]."""
    if len(x) < 2:
        raise ConfigError(f"a covariance needs at least 2 pictures, got {len(x)}")
    return np.atleast_2d(np.cov(x, rowvar=False))


def square_root(cov: Array) -> Array:
    """Return the symmetric square root of a covariance [D, D]."""
    values, axes = np.linalg.eigh(cov)
    root: Array = (axes * np.sqrt(values.clip(min=0.0))) @ axes.T
    return root


def prompt_hits(scores: ArrayLike, subjects: Sequence[Sequence[int]]) -> Array:
    """Return 1.0 where the best-scored names are those of the prompt, else 0.0: [N].

    Args:
        scores: [N, K] of a judge over all names.
        subjects: of each prompt, which names it holds; with two, both must be the first two, in any order.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) != len(subjects):
        raise ConfigError(f"{len(scores)} pictures were scored, but {len(subjects)} prompts given")
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = [
        set(best[: len(wanted)].tolist()) == set(wanted)
        for best, wanted in zip(order, subjects, strict=True)
    ]
    return np.asarray(hits, dtype=np.float64)


def squared_distances(x: ArrayLike, y: ArrayLike) -> Array:
    """Return each picture's mean squared difference [N] of two arrays [N, ...] that belong together row by row."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape:
        raise ConfigError(f"paired arrays must have one shape, got {x.shape} and {y.shape}")
    distances: Array = ((x - y) ** 2).reshape(len(x), -1).mean(axis=1)
    return distances


def diversity(x: ArrayLike, groups: ArrayLike) -> Array:
    """Return for each picture the mean distance of its features [N, D] to those of its group's others [N].

    A picture that is alone in its group has NaN.
    """
    x, group = features_of(x), np.asarray(groups)
    result = np.full(len(x), np.nan)
    for name in np.unique(group):
        rows = np.flatnonzero(group == name)
        if len(rows) > 1:
            away = np.linalg.norm(x[rows, None] - x[None, rows], axis=-1)
            result[rows] = away.sum(axis=1) / (len(rows) - 1)
    return result


def within_manifold(x: ArrayLike, reference: ArrayLike, k: int = 3) -> Array:
    """Return 1.0 where features x [N, D] lie as near to a picture of a reference [M, D] as its neighbours do: [N].

    The mean is the "precision" of a set: the share of its pictures that could be real ones.

    Args:
        k: a picture of the reference reaches as far as its k-th nearest of the others.
    Source:
        Improved precision and recall metric (Kynkaanniemi et al. 2019), equation 1.
    """
    x, reference = features_of(x), features_of(reference)
    if not 1 <= k < len(reference):
        raise ConfigError(f"k must lie in [1, {len(reference) - 1}], got {k}")
    # Of a row the smallest is the picture's distance to itself.
    reach = np.partition(_distances(reference, reference), k, axis=1)[:, k]
    return np.asarray((_distances(x, reference) <= reach).any(axis=1), dtype=np.float64)


def _distances(x: Array, y: Array) -> Array:  # [N, M]
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2.0 * x @ y.T
    distances: Array = np.sqrt(squares.clip(min=0.0))
    return distances


def features_of(values: ArrayLike) -> Array:
    """Return values as [N, D] float64; refuses what is no table of finite numbers."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ConfigError(f"features must be a table [N, D] of finite numbers, got shape {array.shape}")
    return array
