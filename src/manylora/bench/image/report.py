"""A measured table as one JSON object, as markdown, and as a picture of the figures against the number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from manylora.bench.image.intervals import Interval
from manylora.bench.image.rows import ImageRow
from manylora.bench.image.table import RowFigures

_COLUMNS: Mapping[str, str] = {
    "kid": "KID x 1000",
    "frechet": "Frechet distance",
    "accuracy": "prompt accuracy",
    "paired_rmse": "paired RMSE",
    "diversity": "diversity",
    "look_share": "style kept",
    "style_accuracy": "prompt accuracy (style judge)",
    "lora_bytes": "MB of LoRAs",
}
_SHARES = ("accuracy", "look_share", "style_accuracy")
_PLOTTED = ("kid", "frechet", "accuracy", "paired_rmse")


def to_json(figures: RowFigures) -> dict[str, Any]:
    """Return a row as JSON values; numbers keep their bits."""
    told = {name: value for name, value in asdict(figures).items() if name != "row"}
    return {**asdict(figures.row), "unet_calls": figures.row.unet_calls, **told}


def from_json(values: Mapping[str, Any]) -> RowFigures:
    """Return the row that `to_json` wrote."""
    row = ImageRow(**{field.name: values[field.name] for field in fields(ImageRow)})
    # Kept records may be older than the newest columns.
    told: dict[str, Any] = {
        field.name: values[field.name]
        for field in fields(RowFigures)
        if field.name != "row" and field.name in values
    }
    for name, value in told.items():
        if isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
            told[name] = Interval(**value)
    return RowFigures(row=row, **told)


def to_markdown(rows: Sequence[RowFigures]) -> str:
    """Return the table, with the columns that any row has; intervals in brackets."""
    columns = [name for name in _COLUMNS if any(getattr(row, name) is not None for row in rows)]
    heads = ["pictures", "UNet calls", *(_COLUMNS[name] for name in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * 2 + "|---:" * len(columns) + "|"]
    for row in rows:
        cells = [row.row.label, str(row.row.unet_calls or "")]
        cells += [_cell(name, getattr(row, name)) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[RowFigures], path: Path, title: str) -> None:
    """Write a PNG: distances and accuracy against the number of steps, a line for each way of sampling."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(2, 2).flat, _PLOTTED, strict=True):
        for label, line in lines_by_label(rows).items():
            _draw(axes, name, label, line)
        for row in rows:
            if row.row.source != "sampler" and getattr(row, name) is not None:
                axes.axhline(getattr(row, name).value, color="grey", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel="steps", ylabel=_COLUMNS[name].removesuffix(" x 1000"))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def lines_by_label(rows: Sequence[RowFigures]) -> dict[str, list[RowFigures]]:
    """Return the sampled rows that differ in nothing but their steps, by what they have in common."""
    lines: dict[str, list[RowFigures]] = {}
    for row in rows:
        if row.row.source == "sampler":
            name, _, guidance = row.row.label.rpartition(", ")
            lines.setdefault(f"{name.rpartition(', ')[0]}, {guidance}", []).append(row)
    return {label: sorted(line, key=lambda row: row.row.steps) for label, line in lines.items()}


def _draw(axes: Any, name: str, label: str, line: Sequence[RowFigures]) -> None:
    points = [(row.row.steps, getattr(row, name)) for row in line if getattr(row, name) is not None]
    if not points:
        return
    values = [interval.value for _, interval in points]
    # The interval of an estimate without bias may lie to one side of it.
    below = [max(interval.value - interval.low, 0.0) for _, interval in points]
    above = [max(interval.high - interval.value, 0.0) for _, interval in points]
    is_lora = label.startswith(("LCM-LoRA", "phased LoRA"))
    axes.errorbar(
        [steps for steps, _ in points],
        values,
        yerr=[below, above],
        label=label,
        marker="o",
        capsize=2,
        linewidth=2.5 if is_lora else 1,
        linestyle="-" if "guidance" in label or is_lora else "--",
    )


def _cell(name: str, interval: Interval | int | None) -> str:
    if interval is None:
        return ""
    if isinstance(interval, int):
        return f"{interval / 1e6:.2f}"
    ends = (interval.value, interval.low, interval.high)
    if name in _SHARES:
        return "{:.1%} [{:.1%}, {:.1%}]".format(*ends)
    if name == "kid":
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(1000 * end for end in ends))
    return "{:.3g} [{:.3g}, {:.3g}]".format(*ends)
