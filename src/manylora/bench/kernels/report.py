"""The kernels' figures as a table for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from manylora.bench.kernels.result import KernelFigures, KernelsResult


def print_result(result: KernelsResult, console: Console | None = None) -> None:
    """Print each kernel's rates, its share of the machine's, and who was measured beside it."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=170))
    console.print(_table(result))
    for line in _notes(result):
        console.print(line, highlight=False, soft_wrap=True)


def _table(result: KernelsResult) -> Table:
    table = Table(title=f"kernels of {result.config.model}, {_backend(result)}, {result.threads} threads")
    table.add_column("kernel", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    headings = (
        "time",
        "least - most",
        "GB/s",
        "of memory",
        "GFLOP/s",
        "of products",
        "floor\nreached",
        "torch's\ntime",
        "gather's\ntime",
        "dense's\nrate",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: KernelFigures) -> list[str]:
    ours = row.times["ours"]
    dense = row.times_faster("dense")
    return [
        row.kernel,
        row.shape,
        f"{1e6 * ours.median_s:.0f} us",
        f"{1e6 * ours.least_s:.0f} - {1e6 * ours.most_s:.0f}",
        f"{row.gb_s:.1f}",
        f"{row.bandwidth_share:.0%}",
        f"{row.gflop_s:.1f}",
        "" if row.product_share is None else f"{row.product_share:.0%}",
        f"{row.reached:.0%}",
        _times(row.times_faster("torch")),
        _times(row.times_faster("gather")),
        "" if dense is None else f"we: {dense:.0%}",
    ]


def _times(faster: float | None) -> str:
    return "" if faster is None else f"{faster:.2f}x ours"


def _backend(result: KernelsResult) -> str:
    return f"{result.backend} kernels{f' ({result.isa})' if result.isa else ''}"


def _notes(result: KernelsResult) -> Iterator[str]:
    ceilings = result.ceilings
    products = ", ".join(f"{rate:.0f} at {rows} rows" for rows, rate in ceilings.gemm_gflop_s.items())
    yield f"ceilings: memory read {ceilings.memory_read_gb_s:.1f} GB/s; float32 products {products} (GFLOP/s)"
    yield (
        f"each implementation goes through {result.working_set_bytes / 1e6:.0f} MB before it comes back "
        f"(last-level cache: {result.last_level_cache_bytes / 1e6:.0f} MB)"
    )
    yield "shapes: shrink, expand, lora rows:adapters:rank; decode, prefill sequences:tokens; others rows"
    if result.forced:
        yield "[bold]The machine was busy: these figures mean little.[/bold]"
    yield f"commit {result.commit}{' with changes' if result.dirty else ''}; {result.machine.cpu}"
