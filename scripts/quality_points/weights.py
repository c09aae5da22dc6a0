"""The map of weights, style against acceleration at 4 steps: which pair keeps both best, and what the default keeps."""

from collections.abc import Iterator

from lcm_points.records import Record, newest
from manylora.bench.image.rows import STYLE_WEIGHT
from manylora.bench.image.table import RowFigures
from points import Line, missing

COMMAND = "examples/lcm/run.sh weights"


def lines() -> Iterator[Line]:
    record = newest("weights")
    if record is None:
        yield missing("map of style weight x acceleration weight", COMMAND)
        return
    for style in record.values["config"]["styles"]:
        yield from _of(record, style)


def _of(record: Record, style: str) -> Iterator[Line]:
    lcm = record.values["config"]["lcm"]
    rows = [row for row in record.rows if row.row.look == style and row.row.sampler == "lcm"]
    default = record.find(lora=f"{style}:{STYLE_WEIGHT:g}+{lcm}:1", look=style)
    if not rows or default is None:
        yield missing(f"map of {style}", COMMAND)
        return
    best = max(rows, key=_kept)
    yield Line(f"{style}: best of {len(rows)} pairs", f"{best.row.lora}: {_told(best)}", "reported", True)
    yield Line(f"{style}: the default", f"{default.row.lora}: {_told(default)}", "reported", True)


def _kept(row: RowFigures) -> float:
    """The share of style times that of prompts: neither makes up for the other."""
    assert row.look_share is not None
    assert row.style_accuracy is not None
    return row.look_share.value * row.style_accuracy.value


def _told(row: RowFigures) -> str:
    assert row.look_share is not None
    assert row.style_accuracy is not None
    return f"style {row.look_share.value:.0%}, prompt {row.style_accuracy.value:.0%}"
