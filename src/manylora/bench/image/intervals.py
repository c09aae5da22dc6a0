"""95 % bootstrap intervals of what is measured on pictures.

What is drawn again is prompts, each with all its seeds: pictures of one prompt are no independent evidence of what
other prompts would give. Where the prompts are all that a model knows, there are no others, and prompts drawn again
would leave some out, at a distance from a reference that holds them all; then (`within`) each prompt's seeds are drawn.
"""

# Shapes: N pictures of G groups (prompts), M reference pictures, R resamples, D features.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manylora.bench.image.metrics import (
    Array,
    features_of,
    frechet_distance,
    mean_off_diagonal,
    mmd2,
    polynomial_kernel,
)
from manylora.errors import ConfigError

NUM_RESAMPLES = 1000
NUM_FRECHET_RESAMPLES = 200
"""Each takes an eigenvalue problem; ends of the interval are good to a tenth of its length."""


@dataclass(frozen=True)
class Interval:
    """A figure, and the 95 % interval in which it would lie with other prompts of the same kind, or other seeds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def below(self, other: Interval) -> bool:
        """Whether this interval ends before the other begins."""
        return self.high < other.low


def resampled_counts(groups: ArrayLike, num_resamples: int, seed: int, *, within: bool = False) -> Array:
    """Return how often each resample holds each picture [R, N].

    Args:
        groups: [N], the prompt of each picture.
        within: draw from each group, with replacement; otherwise groups, whole.
    """
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    draw = np.random.default_rng(seed)
    if within:
        counts = np.empty((num_resamples, len(place)))
        for group in range(len(names)):
            rows = np.flatnonzero(place == group)
            if len(rows) < 3:
                raise ConfigError(
                    f"an interval over seeds needs at least 3 pictures of each prompt, got {len(rows)}"
                )
            # One less than there are: a group's own mean is nearer to its pictures than the truth is, and as many
            # would give too narrow an interval (Rao and Wu 1988).
            share = np.full(len(rows), 1 / len(rows))
            counts[:, rows] = draw.multinomial(len(rows) - 1, share, num_resamples)
        return counts
    if len(names) < 2:
        raise ConfigError(f"an interval needs pictures of at least 2 prompts, got {len(names)}")
    drawn = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_resamples)
    chosen: Array = drawn[:, place].astype(np.float64)
    return chosen


def mean_interval(
    values: ArrayLike,
    groups: ArrayLike,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    within: bool = False,
) -> Interval:
    """Return the mean of values [N], with its interval."""
    measured = np.asarray(values, dtype=np.float64)
    counts = resampled_counts(groups, num_resamples, seed, within=within)
    return _percentiles(float(measured.mean()), counts @ measured / counts.sum(axis=1))


def rms_interval(
    squares: ArrayLike,
    groups: ArrayLike,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    within: bool = False,
) -> Interval:
    """Return the root of the mean of squares [N], with its interval."""
    of_squares = mean_interval(squares, groups, num_resamples=num_resamples, seed=seed, within=within)
    return Interval(*(float(np.sqrt(end)) for end in (of_squares.value, of_squares.low, of_squares.high)))


def kid_interval(
    x: ArrayLike,
    reference: ArrayLike,
    groups: ArrayLike,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    within: bool = False,
) -> Interval:
    """Return KID of features x [N, D] to a reference [M, D], with its interval over prompts; the reference is fixed.

    A picture that a resample holds twice is not compared with its copy, else every resample would be biased upwards.
    But it holds a prompt's pictures more often, or less often, together than the sample does: the resamples give the
    interval's shape alone, centred at the figure.
    """
    kernel_xx, kernel_xy = polynomial_kernel(x, x), polynomial_kernel(x, reference)
    kernel_yy = polynomial_kernel(reference, reference)
    counts = resampled_counts(groups, num_resamples, seed, within=within)  # [R, N]
    total = counts.sum(axis=1)
    own = np.einsum("rn,rn->r", counts @ kernel_xx, counts) - counts**2 @ np.diag(kernel_xx)
    num_pairs = total**2 - (counts**2).sum(axis=1)
    across = counts @ kernel_xy.mean(axis=1) / total
    within_reference = mean_off_diagonal(kernel_yy)
    resampled = own / num_pairs + within_reference - 2.0 * across
    value = mmd2(kernel_xx, kernel_xy, kernel_yy)
    return _percentiles(value, resampled - resampled.mean() + value)


def frechet_interval(
    x: ArrayLike,
    reference: ArrayLike,
    groups: ArrayLike,
    *,
    num_resamples: int = NUM_FRECHET_RESAMPLES,
    seed: int = 0,
    within: bool = False,
) -> Interval:
    """Return the Frechet distance of x [N, D] to a reference [M, D], with its interval over prompts.

    A resample holds some pictures twice and so has less spread than N pictures have: its distance is biased further
    upwards than the figure's own. So the resamples give the interval's shape alone, centred at the figure.
    """
    features, value = features_of(x), frechet_distance(x, reference)
    counts = resampled_counts(groups, num_resamples, seed, within=within).astype(np.int64)
    resampled = np.asarray(
        [frechet_distance(np.repeat(features, times, axis=0), reference) for times in counts]
    )
    return _percentiles(value, resampled - resampled.mean() + value)


def difference_interval(
    values: ArrayLike,
    others: ArrayLike,
    groups: ArrayLike,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    within: bool = False,
) -> Interval:
    """Return the mean of values - others, both [N] on the same prompts and seeds, with its interval."""
    away = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    return mean_interval(away, groups, num_resamples=num_resamples, seed=seed, within=within)


def _percentiles(value: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))
