"""The picture of a run: training loss by step, its running mean, and the held-out loss where it was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_losses(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str, unit: str = "nats a token"
) -> None:
    """Write a PNG from metric rows: `loss` per training step, `eval_loss` where a row has one.

    Args:
        rows: as in metrics.jsonl, at least one with a `loss`.
        unit: of the losses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure without pyplot: no global state, and no display is asked for.
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows if "loss" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
    axes.plot(steps, running_mean(losses, share=0.05), color="tab:blue", linewidth=2, label="running mean")
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color="tab:orange",
            marker="o",
            linestyle=":",
            label="held-out loss",
        )
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def running_mean(values: Sequence[float], share: float) -> list[float]:
    """Mean over the last `share` of all values, at least one, at each point."""
    width = max(1, round(len(values) * share))
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
