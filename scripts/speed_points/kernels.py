"""How near the kernels come to what the machine can do. Read from the kept record of `manylora bench kernels`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from points import Line, missing
from speed_points.text_records import RECORDS, said

COMMAND = "manylora bench kernels --record"
MANY_ROWS = "512:32:64"
"""512 rows of 32 adapters of rank 64; the two others likewise."""
FEW_ROWS = "32:32:8"
STEP = "128:128:8"
MIN_OVER_GATHER = 10.0
MIN_OF_DENSE = 0.7
MIN_OF_MEMORY = 0.8
MAX_OVER_BYTES = 1.3
MIN_CACHES = 4

Record = dict[str, Any]


def lines() -> Iterator[Line]:
    record = newest()
    if record is None:
        yield missing("kernels", COMMAND)
        return
    yield _record(record)
    for kernel in ("shrink", "expand"):
        row = find(record, kernel, MANY_ROWS)
        if row is None:
            yield missing(f"{kernel}, {MANY_ROWS}", COMMAND)
            continue
        faster = _median(row, "gather") / _median(row, "ours")
        yield Line(
            f"{kernel}, 512 rows, 32 adapters, rank 64: times faster than gathering",
            f"{faster:.1f} ({_us(row, 'ours')} / {_us(row, 'gather')})",
            f">= {MIN_OVER_GATHER:g}",
            faster >= MIN_OVER_GATHER,
        )
        share = _median(row, "dense") / _median(row, "ours")
        yield Line(
            f"{kernel}, the same: of torch's dense float32 rate at 16 rows",
            f"{share:.0%} ({row['gflop_s']:.0f} GFLOP/s)",
            f">= {MIN_OF_DENSE:.0%}",
            share >= MIN_OF_DENSE,
        )
    for kernel in ("shrink", "expand", "lora"):
        yield _of_memory(record, kernel)
    yield _over_bytes(record)
    for kernel in dict.fromkeys(row["kernel"] for row in record["rows"]):
        yield _reported(kernel, [row for row in record["rows"] if row["kernel"] == kernel])


def newest(folder: Path = RECORDS) -> Record | None:
    """The newest record of what the bounds speak of; other settings are somebody's own question."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*_kernels-*.json")]
    fitting = [record for record in records if f"{record['command']} --record" == COMMAND]
    return max(fitting, key=lambda record: str(record["started"]), default=None)


def find(record: Record, kernel: str, shape: str) -> dict[str, Any] | None:
    """The row of a kernel on a shape."""
    return next((row for row in record["rows"] if (row["kernel"], row["shape"]) == (kernel, shape)), None)


def _record(record: Record) -> Line:
    caches = record["working_set_bytes"] / record["last_level_cache_bytes"]
    memory, products = record["ceilings"]["memory_read_gb_s"], record["ceilings"]["gemm_gflop_s"]
    repeats = record["config"]["repeats"]
    return Line(
        f"kernels: {said(record)}",
        f"{record['isa']}, {record['threads']} threads; read {memory:.1f} GB/s, products "
        f"{', '.join(f'{rate:.0f}' for rate in products.values())} GFLOP/s",
        f"working sets of {MIN_CACHES} caches ({caches:.1f}), 3 turns ({repeats}); `{record['command']} --record`",
        caches >= MIN_CACHES and repeats >= 3 and not record["forced"],
    )


def _of_memory(record: Record, kernel: str) -> Line:
    """lora: shrink and expand at once, as an engine calls them."""
    point = f"{kernel} of a layer, 32 rows of 32 adapters, rank 8: of the memory's bandwidth"
    row = find(record, kernel, FEW_ROWS)
    if row is None:
        return missing(point, COMMAND)
    share = row["bandwidth_share"]
    return Line(
        point, f"{share:.0%} ({row['gb_s']:.1f} GB/s)", f">= {MIN_OF_MEMORY:.0%}", share >= MIN_OF_MEMORY
    )


def _over_bytes(record: Record) -> Line:
    point = "lora of a layer, 128 rows of 128 adapters, rank 8: time over its bytes'"
    row = find(record, "lora", STEP)
    if row is None:
        return missing(point, COMMAND)
    over = 1 / row["bandwidth_share"]
    return Line(point, f"{over:.2f} ({_us(row, 'ours')})", f"<= {MAX_OVER_BYTES}", over <= MAX_OVER_BYTES)


def _reported(kernel: str, rows: list[dict[str, Any]]) -> Line:
    reached = [row["reached"] for row in rows]
    twin = [_median(row, "torch") / _median(row, "ours") for row in rows]
    return Line(
        f"  {kernel}, {len(rows)} shapes: of its ceiling; times faster than in torch",
        f"{min(reached):.0%} to {max(reached):.0%}; {min(twin):.1f} to {max(twin):.1f}",
        "reported",
        True,
    )


def _median(row: dict[str, Any], arm: str) -> float:
    return float(row["times"][arm]["median_s"])


def _us(row: dict[str, Any], arm: str) -> str:
    return f"{1e6 * _median(row, arm):.0f} us"
