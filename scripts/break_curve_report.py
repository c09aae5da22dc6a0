"""Tables and plot of docs/diagnosis.md, from what break_curve.py measured: does the verdict tell what breaks?

    python scripts/break_curve_report.py

Defined before anything was measured: a mixture is broken if it raises the loss of the held-out paragraphs by more than
0.5 nats a token (a perplexity 1.65 times the base's), strained above 0.15 (1.16 times), else fine. The verdict, by the
thresholds as they are now, saw the probe texts only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from manylora.models.probe import Change, ProbeResult
from manylora.models.verdict import LOSS_INCREASE, Level, judge

STRAINED_ABOVE, BROKEN_ABOVE = 0.15, 0.5
"""Rise of the held-out loss in nats a token."""

COLOURS = {Level.FINE: "tab:green", Level.STRAINED: "tab:orange", Level.BROKEN: "tab:red"}

DOCS = Path(__file__).parent.parent / "docs"

Row = dict[str, Any]
"""One mixture, as the data file holds it."""


def level_of(rise: float) -> Level:
    """What the mixture did to the held-out paragraphs."""
    return Level.BROKEN if rise > BROKEN_ABOVE else Level.STRAINED if rise > STRAINED_ABOVE else Level.FINE


def verdict_of(row: Row) -> Level:
    """What `inspect` says of it, by the thresholds of today."""
    mixture, parts = row["probe"]["mixture"], row["probe"]["parts"]
    result = ProbeResult(
        **{**row["probe"], "mixture": Change(**mixture), "parts": tuple(Change(**p) for p in parts)}
    )
    return judge(result, list(row["weights"])).level


FIGURES: dict[str, Callable[[Row], float]] = {
    "loss of the probes": lambda row: row["probe"]["mixture"]["loss_increase"],
    "KL": lambda row: row["probe"]["mixture"]["kl"],
    "top-1 disagreement": lambda row: -row["probe"]["mixture"]["top1_agreement"],
    "non-additivity": lambda row: row["probe"]["non_additivity"] or 0.0,
    "relative norm": lambda row: row["relative_norm"],
    "largest relative norm of a site": lambda row: row["max_relative_norm"],
    "largest cosine of a pair": lambda row: row["max_cosine"],
    "number of adapters": lambda row: len(row["weights"]),
}


def separation(rows: Sequence[Row], figure: Callable[[Row], float]) -> float:
    """How often a broken mixture has the larger figure than one that is not: the area under the ROC curve."""
    broken = [figure(row) for row in rows if level_of(row["held_out_rise"]) is Level.BROKEN]
    others = [figure(row) for row in rows if level_of(row["held_out_rise"]) is not Level.BROKEN]
    wins = sum((a > b) + 0.5 * (a == b) for a in broken for b in others)
    return wins / (len(broken) * len(others))


def print_tables(rows: Sequence[Row]) -> None:
    for groups in (("curve",), ("mild",), ("strong",), ("mild", "strong")):
        of = [row for row in rows if row["group"] in groups]
        print(f"\n{' and '.join(groups)}: {len(of)} mixtures\n")
        print("| held-out text | fine | strained | broken |\n|---|--:|--:|--:|")
        for level in Level:
            said = [verdict_of(row) for row in of if level_of(row["held_out_rise"]) is level]
            print(f"| {level} | {' | '.join(str(said.count(other)) for other in Level)} |")
    print("\n| figure | mild and strong | mild | strong |\n|---|--:|--:|--:|")
    for name, figure in FIGURES.items():
        areas = (
            separation([row for row in rows if row["group"] in groups], figure)
            for groups in (("mild", "strong"), ("mild",), ("strong",))
        )
        print(f"| {name} | {' | '.join(f'{area:.2f}' for area in areas)} |")


def draw(rows: Sequence[Row], file: Path) -> None:
    """Left, the curve; right, the random mixtures; the colour of a point is the verdict, its height what came."""
    figure = Figure(figsize=(10, 4.2), dpi=90)
    left, right = figure.subplots(1, 2)
    _draw_curve(left, [row for row in rows if row["group"] == "curve"])
    _draw_random(right, [row for row in rows if row["group"] != "curve"])
    for axes in (left, right):
        axes.set_yscale("symlog", linthresh=0.5)
        _label(axes.yaxis)
        axes.set_ylabel("held-out loss, rise in nats a token")
        for at, level in ((STRAINED_ABOVE, Level.STRAINED), (BROKEN_ABOVE, Level.BROKEN)):
            axes.axhline(at, color=COLOURS[level], lw=0.8)
            axes.annotate(f"{level} above", (1, at), xycoords=("axes fraction", "data"), xytext=(-3, 3),
                          textcoords="offset points", ha="right", fontsize=7, color=COLOURS[level])  # fmt: skip
    figure.tight_layout()
    figure.savefig(file)


def _draw_curve(axes: Axes, rows: Sequence[Row]) -> None:
    for weight in sorted({w for row in rows for w in row["weights"].values()}):
        of = [row for row in rows if weight in row["weights"].values()]
        counts, rises = [len(row["weights"]) for row in of], [row["held_out_rise"] for row in of]
        axes.plot(counts, rises, color="0.6", zorder=1)
        axes.scatter(counts, rises, c=[COLOURS[verdict_of(row)] for row in of], zorder=2)
        axes.annotate(
            f"weight {weight:g}", (counts[-1], rises[-1]), (6, -3), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="adapters: 4 trained, then synthetic", xlim=(0.5, 14.5), title="More and more adapters")


def _draw_random(axes: Axes, rows: Sequence[Row]) -> None:
    for level, colour in COLOURS.items():
        of = [row for row in rows if verdict_of(row) is level]
        seen = [row["probe"]["mixture"]["loss_increase"] for row in of]
        axes.scatter(seen, [row["held_out_rise"] for row in of], c=colour, s=16, label=f"verdict: {level}")
    for at in (LOSS_INCREASE.strained, LOSS_INCREASE.broken):
        axes.axvline(at, color="0.5", lw=0.8, ls="--")
    axes.set_xscale("symlog", linthresh=0.5)  # straight near zero, logarithmic beyond
    _label(axes.xaxis)
    axes.set(xlabel="loss of the probe texts, rise in nats a token", title=f"{len(rows)} random mixtures")
    axes.legend(fontsize=8, loc="upper left")


def _label(axis: Axis) -> None:
    axis.set_major_locator(FixedLocator([-0.3, 0, 0.3, 1, 3, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(ScalarFormatter())


def main() -> None:
    rows = json.loads((DOCS / "data" / "break_curve.json").read_text())["rows"]
    print_tables(rows)
    draw(rows, DOCS / "break_curve.png")


if __name__ == "__main__":
    main()
