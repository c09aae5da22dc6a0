"""A line through step times, and how far each lies from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

import numpy as np


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One point of a table."""

    value: int
    """Of what changes."""

    step_s: float
    """Median over the repeats of the median of their steps; least and most likewise."""

    least_s: float
    most_s: float
    fit_s: float
    residual: float
    """fit_s over step_s, less one."""


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """Step time over one number, and the line intercept_s + slope_s * number that misses it least, each point's
    distance taken as a share of its own time."""

    intercept_s: float
    slope_s: float
    largest_residual: float
    points: tuple[StepTime, ...]

    @classmethod
    def of(cls, samples_s: Mapping[int, Sequence[float]]) -> Self:
        """samples_s: value of what changes to its step time in each repeat."""
        values = list(samples_s)
        times = [median(samples) for samples in samples_s.values()]
        intercept_s, slope_s = fit_line(values, times)
        points = tuple(
            StepTime(
                value=value,
                step_s=time,
                least_s=min(samples),
                most_s=max(samples),
                fit_s=intercept_s + slope_s * value,
                residual=(intercept_s + slope_s * value) / time - 1,
            )
            for (value, samples), time in zip(samples_s.items(), times, strict=True)
        )
        return cls(
            intercept_s=intercept_s,
            slope_s=slope_s,
            largest_residual=max(abs(point.residual) for point in points),
            points=points,
        )


def fit_line(values: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Return (intercept, slope) with the least sum of ((intercept + slope * value) / time - 1)^2."""
    x, t = np.asarray(values, dtype=np.float64), np.asarray(times, dtype=np.float64)
    (intercept, slope), *_ = np.linalg.lstsq(np.stack([1 / t, x / t], axis=1), np.ones(len(t)), rcond=None)
    return float(intercept), float(slope)
