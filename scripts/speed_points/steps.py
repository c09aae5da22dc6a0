"""What a step takes: its LoRA over the bytes that it must read, and how it grows. Read from kept records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from points import Line, missing
from speed_points.text_records import RECORDS, newest, said

COMMAND = "manylora bench steps"
MAX_RESIDUAL = 0.1
MAX_OVER_BYTES = 1.3

WITH_ADAPTERS = {"adapters": 128, "rank": [8], "distribution": "uniform", "resident": True}
FIGURES = {
    "float32": ("benchmarks/figures/speed_float32.sh", "auto"),
    "int8": ("benchmarks/figures/speed_int8.sh", "int8"),
}
"""Of each dtype the command, and how it keeps adapters."""


def lines() -> Iterator[Line]:
    for dtype, (command, adapter_dtype) in FIGURES.items():
        yield from _parts(dtype, command, adapter_dtype)
    for dtype in FIGURES:
        yield from _tables(dtype)


def _parts(dtype: str, command: str, adapter_dtype: str) -> Iterator[Line]:
    row = newest(dtype=dtype, adapter_dtype=adapter_dtype, **WITH_ADAPTERS)
    point = f"LoRA of a decode step, 128 adapters, {dtype}: time over its bytes'"
    if row is None or "decode" not in row.get("steps", {}):
        yield missing(point, command)
        return
    lora = row["steps"]["decode"]["lora"]
    over = lora["spent_s"] / lora["byte_floor_s"]
    yield Line(
        point,
        f"{over:.2f} ({said(row)})",
        f"<= {MAX_OVER_BYTES}; `{command}`",
        over <= MAX_OVER_BYTES and not row["forced"],
    )
    for kind, steps in row["steps"].items():
        shares = ", ".join(f"{part} {steps[part]['reached']:.0%}" for part in ("base", "lora", "attention"))
        other = steps["other_s"] / steps["spent_s"]
        yield Line(
            f"  {kind}, {dtype}: share of the floor", f"{shares}; all else {other:.0%}", "reported", True
        )


def _tables(dtype: str) -> Iterator[Line]:
    command = f"{_command(dtype)} --record"
    record = newest_tables(dtype)
    if record is None:
        yield missing(f"step time over batch, context and rank, {dtype}", command)
        return
    for name, table in record["tables"].items():
        points = table["points"]
        worst = max(points, key=lambda point: abs(point["residual"]))
        yield Line(
            f"step time over {name} {points[0]['value']}..{points[-1]['value']}, {dtype}: {said(record)}",
            f"{1e3 * table['intercept_s']:.1f} + {1e3 * table['slope_s']:.3g} x {name} ms; "
            f"off by {worst['residual']:+.0%} at {worst['value']}",
            f"<= {MAX_RESIDUAL:.0%}; `{command}`",
            table["largest_residual"] <= MAX_RESIDUAL and not record["forced"],
        )


def newest_tables(dtype: str, folder: Path = RECORDS) -> dict[str, Any] | None:
    """The newest record of a dtype, in all else as the command without options measures."""
    files = folder.glob(f"*_steps-{dtype}-*.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    fitting = [record for record in records if record["command"] == _command(dtype)]
    return max(fitting, key=lambda record: str(record["started"]), default=None)


def _command(dtype: str) -> str:
    return COMMAND if dtype == "float32" else f"{COMMAND} --dtype {dtype}"
