"""Pictures of a measurement: over time, by adapter, as distributions; and the curve over the number of adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from manylora.bench.serve.job import Outcome
from manylora.bench.serve.result import ServeResult
from manylora.bench.serve.run import Measured
from manylora.bench.serve.stats import attainment

NUM_WINDOWS = 20


def plot_all(measured: Measured, folder: Path) -> list[Path]:
    """Write a picture for each rate, of all runs at it, and the curve if it is one; return the files."""
    result = measured.result
    if result.kind == "adapters":
        curve = folder / "adapters.png"
        plot_curve(result, curve)
        every = folder / "runs.png"
        plot_runs({row.run.label: o for row, o in _pairs(measured)}, every, result.config.slo_s)
        return [curve, every]
    files = []
    for rate in dict.fromkeys(row.run.rate for row in result.rows):
        shown = {row.run.label: o for row, o in _pairs(measured) if row.run.rate == rate}
        files.append(folder / f"rate-{rate:.2f}.png")
        plot_runs(shown, files[-1], result.config.slo_s)
    return files


def plot_runs(runs: dict[str, Sequence[Outcome]], path: Path, slo_s: float) -> None:
    """Write one picture: attainment and first-token latency over time, its distribution, and by adapter."""
    figure = _figure(12, 8)
    over_time, latency, distribution, by_adapter = figure.subplots(2, 2).flat
    for label, outcomes in runs.items():
        windows = windows_of(outcomes)
        over_time.plot(
            [middle for middle, _ in windows],
            [attainment(own, slo_s) for _, own in windows],
            label=label,
            marker=".",
        )
        medians = [(middle, _median(o.ttft_s for o in own)) for middle, own in windows]
        latency.plot(
            *zip(*[(m, s) for m, s in medians if s is not None] or [(0, np.nan)], strict=True), marker="."
        )
        distribution.step(*cumulative(outcomes), where="post")
        by_adapter.plot(mean_by_adapter(outcomes))
    over_time.set(
        xlabel="arrival, s", ylabel=f"share with first token within {slo_s:g} s", ylim=(-0.02, 1.02)
    )
    latency.set(xlabel="arrival, s", ylabel="first-token latency, median, s", yscale="log")
    distribution.set(
        xlabel="first-token latency, s", ylabel="share of all requests", xscale="log", ylim=(0, 1.02)
    )
    by_adapter.set(
        xlabel="adapters, the best served first", ylabel="first-token latency, mean, s", yscale="log"
    )
    for axes in (latency, by_adapter):
        axes.axhline(slo_s, color="grey", linestyle=":")
    distribution.axvline(slo_s, color="grey", linestyle=":")
    over_time.legend(fontsize=7)
    _save(figure, path)


def plot_curve(result: ServeResult, path: Path) -> None:
    """Write one picture: throughput and step time over the number of adapters, beside what reading them explains."""
    figure = _figure(12, 4.5)
    rate, step = figure.subplots(1, 2)
    numbers = [row.run.adapters for row in result.rows]
    rate.plot(numbers, [row.figures.requests_per_s for row in result.rows], marker="o", label="finished")
    rate.plot(numbers, [row.run.rate for row in result.rows], color="grey", linestyle=":", label="sent")
    rate.set(ylabel="requests a second", ylim=(0, None))
    told = [row for row in result.rows if row.engine is not None and row.engine.step_s is not None]
    if told:
        seconds = [1e3 * row.engine.step_s for row in told]  # type: ignore[union-attr, operator]
        step.plot([row.run.adapters for row in told], seconds, marker="o", label="a step")
        if result.explained is not None:
            distinct = [row.engine.distinct_adapters_per_step or 0.0 for row in told]  # type: ignore[union-attr]
            reading = [seconds[0] + 1e3 * result.explained.read_s(number) for number in distinct]
            step.plot(
                [row.run.adapters for row in told],
                reading,
                linestyle="--",
                label="the first row's step, and reading the adapters of this one's",
            )
    step.set(ylabel="ms", ylim=(0, None))
    for axes in (rate, step):
        axes.set_xscale("symlog", linthresh=1)
        axes.set(xlabel="adapters", xlim=(-0.2, 1.3 * max(*numbers, 1)))
        axes.legend(fontsize=8)
    _save(figure, path)


def windows_of(outcomes: Sequence[Outcome]) -> list[tuple[float, list[Outcome]]]:
    """Cut a run into equal times by arrival; (middle, its requests) of those that have any."""
    end_s = max(outcome.planned_s for outcome in outcomes)
    width_s = max(end_s / NUM_WINDOWS, 1e-9)
    windows: defaultdict[int, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        windows[min(int(outcome.planned_s / width_s), NUM_WINDOWS - 1)].append(outcome)
    return [((number + 0.5) * width_s, own) for number, own in sorted(windows.items())]


def cumulative(outcomes: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    """First-token latencies in order, and the share of all requests that had theirs by then."""
    latencies = sorted(outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None)
    return latencies, [(number + 1) / len(outcomes) for number in range(len(latencies))]


def mean_by_adapter(outcomes: Iterable[Outcome]) -> list[float]:
    """Mean first-token latency of each adapter that had any, the least first."""
    latencies: defaultdict[int | None, list[float]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.ttft_s is not None:
            latencies[outcome.adapter].append(outcome.ttft_s)
    return sorted(float(np.mean(own)) for own in latencies.values())


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _pairs(measured: Measured) -> Any:
    return zip(measured.result.rows, measured.outcomes, strict=True)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
