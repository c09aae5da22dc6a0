"""Tables and plot of docs/diagnosis.md on pictures, from what mixture_breaks.py measured: does the verdict tell?

    python scripts/mixture_breaks_report.py

A set is broken if its share of good pictures is below 0.7 of the acceleration LoRA's alone, strained below 0.85: fixed
before anything was measured. Thresholds are chosen on the half "fit"; what is said of the verdict is of "held".

The area under the ROC curve is how often a broken set has the larger figure than one that is not; intervals are 95 % of
2,000 resamples of sets.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from manylora.bench.image.intervals import Interval
from manylora.models.image_probe import DenoiserChange, ImageProbeResult
from manylora.models.image_verdict import judge_image, risk
from manylora.models.verdict import Level
from mixture_breaks import BROKEN_BELOW, DATA, STRAINED_BELOW

DOCS = Path(__file__).parent.parent / "docs"
COLOURS = {Level.FINE: "tab:green", Level.STRAINED: "tab:orange", Level.BROKEN: "tab:red"}
NUM_RESAMPLES = 2000
VERDICT = "verdict"

Row = dict[str, Any]
FigureOf = Callable[[Row], float]


def change_of(row: Row) -> DenoiserChange:
    seen = dict(row["probe"]["mixture"])
    return DenoiserChange(**seen | {"divergence_by_level": tuple(seen["divergence_by_level"])})


def verdict_of(row: Row) -> Level:
    """What `inspect` says of it, by the thresholds of today."""
    result = ImageProbeResult(
        **{
            **row["probe"],
            "timesteps": tuple(row["probe"]["timesteps"]),
            "mixture": change_of(row),
            "parts": tuple(DenoiserChange(**part) for part in row["probe"]["parts"]),
        }
    )
    return judge_image(result, sorted(row["weights"])).level


PROBED: Mapping[str, FigureOf] = {
    "prompt disagreement": lambda row: change_of(row).prompt_disagreement,
    "difference of predictions": lambda row: change_of(row).divergence,
    "difference at the noisiest level": lambda row: change_of(row).divergence_by_level[0],
    "difference at the cleanest level": lambda row: change_of(row).divergence_by_level[-1],
    "change of prompt gain": lambda row: abs(math.log(max(change_of(row).prompt_gain, 1e-6))),
    "roughness": lambda row: change_of(row).roughness,
    "consistency residual": lambda row: change_of(row).residual,
    "non-additivity": lambda row: row["probe"]["non_additivity"] or 0.0,
}
"""Of the denoiser."""

PLAIN: Mapping[str, FigureOf] = {
    "summed norm of the deltas": lambda row: row["summed_norm"],
    "number of LoRAs": lambda row: len(row["weights"]),
    "largest cosine of a pair": lambda row: row["max_cosine"],
}
"""What one would look at first; the verdict has to beat each."""

OF_WEIGHTS: Mapping[str, FigureOf] = {
    "norm of the summed delta": lambda row: row["norm"],
    "largest relative norm of a site": lambda row: row["max_relative_norm"],
    "largest overlap of a pair": lambda row: row["max_overlap"],
}

FIGURES: Mapping[str, FigureOf] = {
    VERDICT: lambda row: risk(change_of(row)),
    **PROBED,
    **PLAIN,
    **OF_WEIGHTS,
}


@dataclass(frozen=True)
class Measured:
    """The data file."""

    reference: Mapping[str, float]
    rows: Sequence[Row]

    def group(self, name: str) -> list[Row]:
        return [row for row in self.rows if row["group"] == name]

    def level(self, row: Row) -> Level:
        """What the judge saw."""
        share = row["good"] / self.reference["good"]
        if share < BROKEN_BELOW:
            return Level.BROKEN
        return Level.STRAINED if share < STRAINED_BELOW else Level.FINE

    def is_broken(self, rows: Sequence[Row]) -> NDArray[np.bool_]:
        return np.array([self.level(row) is Level.BROKEN for row in rows])


def read(file: Path = DATA) -> Measured:
    kept = json.loads(file.read_text(encoding="utf-8"))
    return Measured(kept["reference"], kept["rows"])


def area(figure: NDArray[np.float64], broken: NDArray[np.bool_], weight: NDArray[np.float64]) -> float:
    """Area under the ROC curve; NaN where one of the two kinds is missing.

    Args:
        weight: [N], how often each set counts.
    """
    wins = (figure[:, None] > figure[None]) + 0.5 * (figure[:, None] == figure[None])
    pairs = (weight * broken)[:, None] * (weight * ~broken)[None]
    total = pairs.sum()
    return float((wins * pairs).sum() / total) if total else math.nan


def resamples(num: int, seed: int = 0) -> NDArray[np.float64]:  # [R, N]
    draw = np.random.default_rng(seed)
    return draw.multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES).astype(np.float64)


def areas(measured: Measured, group: str) -> dict[str, Interval]:
    """Each figure's area under the ROC curve on a half, with its interval."""
    rows = measured.group(group)
    broken, drawn = measured.is_broken(rows), resamples(len(rows))
    found = {}
    for name, figure in FIGURES.items():
        values = np.array([figure(row) for row in rows])
        spread = [area(values, broken, weight) for weight in drawn]
        found[name] = _interval(area(values, broken, np.ones(len(rows))), spread)
    return found


def ahead(measured: Measured, baseline: str, group: str = "held") -> Interval:
    """The verdict's area less a baseline's, on the same resamples."""
    rows = measured.group(group)
    broken = measured.is_broken(rows)
    ours, theirs = (np.array([FIGURES[name](row) for row in rows]) for name in (VERDICT, baseline))
    once = np.ones(len(rows))
    away = area(ours, broken, once) - area(theirs, broken, once)
    return _interval(away, [area(ours, broken, w) - area(theirs, broken, w) for w in resamples(len(rows))])


def mended(measured: Measured) -> tuple[Interval, list[Row]]:
    """The share of broken sets that the proposed weights mend, and those sets; NaN where none was repaired."""
    limit = BROKEN_BELOW * measured.reference["good"]
    rows = [row for row in measured.rows if "repair" in row]
    if not rows:
        return Interval(math.nan, math.nan, math.nan), rows
    mends = np.array([row["repair"]["good"] >= limit for row in rows], dtype=np.float64)
    spread = resamples(len(rows)) @ mends / len(rows)
    return _interval(float(mends.mean()), list(spread)), rows


def best_threshold(values: NDArray[np.float64], bad: NDArray[np.bool_]) -> float:
    """Where calling every larger figure bad is right for as much of the bad as of the others: Youden's point."""
    if not bad.any() or bad.all():
        return math.nan
    points = np.unique(values)
    middles = (points[1:] + points[:-1]) / 2
    scores = [(values[bad] > at).mean() - (values[~bad] > at).mean() for at in middles]
    return float(middles[int(np.argmax(scores))]) if len(middles) else math.nan


def print_thresholds(measured: Measured) -> None:
    """Of each figure of the probe what the half "fit" gives; models/image_verdict.py has those of the best."""
    rows = measured.group("fit")
    levels = [measured.level(row) for row in rows]
    print("\nThresholds by the half 'fit':\n\n| figure | strained above | broken above |\n|---|--:|--:|")
    for name, figure in PROBED.items():
        values = np.array([figure(row) for row in rows])
        found = (
            best_threshold(values, np.array([level >= least for level in levels]))
            for least in (Level.STRAINED, Level.BROKEN)
        )
        print(f"| {name} | {' | '.join(f'{at:.3g}' for at in found)} |")


def print_tables(measured: Measured) -> None:
    for group in ("fit", "held"):
        rows = measured.group(group)
        print(f"\n{group}: {len(rows)} sets\n\n| pictures | fine | strained | broken |\n|---|--:|--:|--:|")
        for level in Level:
            said = [verdict_of(row) for row in rows if measured.level(row) is level]
            print(f"| {level} | {' | '.join(str(said.count(other)) for other in Level)} |")
    fit, held = areas(measured, "fit"), areas(measured, "held")
    print("\nArea under the ROC curve:\n\n| figure | fit | held |\n|---|--:|--:|")
    for name in FIGURES:
        print(f"| {name} | {_cell(fit[name])} | {_cell(held[name])} |")
    print("\n| the verdict's area less that of | held |\n|---|--:|")
    for name in PLAIN:
        print(f"| {name} | {_cell(ahead(measured, name), '+.2f')} |")
    share, rows = mended(measured)
    if rows:
        factors = sorted(row["repair"]["factor"] for row in rows)
        print(
            f"\nRepair: {_cell(share)} of {len(rows)} broken sets, by a factor of {factors[len(factors) // 2]:.2f} "
            "in the median"
        )


def draw(measured: Measured, file: Path) -> None:
    """Left, the more LoRAs the fewer good pictures; right, the risk that the verdict sees against what came."""
    figure = Figure(figsize=(10, 4.2), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = measured.group("held")
    for level, colour in COLOURS.items():
        of = [row for row in rows if verdict_of(row) is level]
        shares = [row["good"] / measured.reference["good"] for row in of]
        left.scatter([len(row["weights"]) for row in of], shares, c=colour, s=16, label=f"verdict: {level}")
        right.scatter([risk(change_of(row)) for row in of], shares, c=colour, s=16)
    for axes in (left, right):
        axes.set_ylabel("good pictures, of the acceleration LoRA's alone")
        for at, level in ((STRAINED_BELOW, Level.STRAINED), (BROKEN_BELOW, Level.BROKEN)):
            axes.axhline(at, color=COLOURS[level], lw=0.8)
    left.set(xlabel="LoRAs beside the acceleration", title=f"{len(rows)} held-out sets")
    left.legend(fontsize=7)
    right.axvline(1.0, color="0.5", lw=0.8, ls="--")
    right.set(xlabel="risk by the probe (broken above 1)", xscale="log", title="What the probe foresees")
    right.minorticks_off()  # their labels would lie over each other
    right.set_xticks(ticks := [0.3, 0.5, 1, 2, 5], [f"{tick:g}" for tick in ticks])
    figure.savefig(file)


def _interval(value: float, spread: Sequence[float]) -> Interval:
    kept = [one for one in spread if not math.isnan(one)]
    low, high = np.percentile(kept, [2.5, 97.5]) if kept else (math.nan, math.nan)
    return Interval(value, float(low), float(high))


def _cell(interval: Interval, form: str = ".2f") -> str:
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--plot", type=Path, default=DOCS / "mixture_breaks.png")
    options = parser.parse_args()
    measured = read(options.data)
    print_tables(measured)
    print_thresholds(measured)
    draw(measured, options.plot)


if __name__ == "__main__":
    main()
