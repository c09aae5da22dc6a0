"""A result as a table for people, and as the one line that is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from manylora.bench.text.result import BenchResult, Figures, PeerResult


def json_line(result: BenchResult) -> str:
    """One JSON object without a line break."""
    return json.dumps(result.to_json(), separators=(",", ":"))


def print_result(result: BenchResult, console: Console | None = None) -> None:
    """Print who was how fast, beside its baseline and its ceiling, and what the pool held."""
    # Into a file or a pipe: wide enough for the table, whatever the terminal.
    console = console or (Console() if sys.stdout.isatty() else Console(width=130))
    console.print(_speed_table(result))
    if result.steps:
        console.print(_step_table(result))
    for line in _notes(result):
        console.print(line, highlight=False, soft_wrap=True)


def _speed_table(result: BenchResult) -> Table:
    config = result.config
    table = Table(
        title=f"{config.requests} requests of {config.prompt_tokens} + {config.output_tokens} tokens, "
        f"{config.adapters} adapters ({config.distribution}), {result.dtype}, {result.threads} threads"
    )
    table.add_column("", no_wrap=True)
    for heading in (
        "tokens/s",
        "least - most",
        "baseline",
        "ceiling",
        "first token\np50 / p99",
        "per token\np50",
        "peak\nmemory",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    own = f"{result.tokens_per_s / result.base_tokens_per_s:.2f}x base alone"
    floors = result.floors
    table.add_row(
        "manylora", *_cells(_own_figures(result), own, f"{floors.reached:.0%} of {floors.tokens_per_s:.0f}")
    )
    ceiling = f"{floors.base_reached:.0%} of {floors.base_tokens_per_s:.0f}"
    rate, spread = f"{result.base_tokens_per_s:.1f}", _spread(result.base_tokens_per_s_range)
    table.add_row("base alone", rate, spread, "", ceiling)
    for name, peer in result.peers.items():
        table.add_row(f"{name}, batch {peer.batch}", *_cells(peer, f"we: {peer.speedup:.2f}x", ""))
    for name, figures in result.without.items():
        table.add_row(f"without {name}", *_cells(figures, f"with: {figures.speedup:.2f}x", ""))
    return table


def _own_figures(result: BenchResult) -> Figures:
    return Figures(
        tokens_per_s=result.tokens_per_s,
        requests_per_s=result.requests_per_s,
        ttft_p50_s=result.ttft_p50_s,
        ttft_p99_s=result.ttft_p99_s,
        tpot_p50_s=result.tpot_p50_s,
        peak_rss_bytes=result.peak_rss_bytes,
        tokens_per_s_range=result.tokens_per_s_range,
    )


def _cells(figures: Figures, baseline: str, ceiling: str) -> list[str]:
    return [
        f"{figures.tokens_per_s:.1f}",
        _spread(figures.tokens_per_s_range),
        baseline,
        ceiling,
        f"{figures.ttft_p50_s:.2f} / {figures.ttft_p99_s:.2f} s",
        f"{figures.tpot_p50_s * 1000:.0f} ms",
        f"{figures.peak_rss_bytes / 1e9:.2f} GB",
    ]


def _spread(least_most: tuple[float, float]) -> str:
    return f"{least_most[0]:.1f} - {least_most[1]:.1f}"


def _step_table(result: BenchResult) -> Table:
    table = Table(
        title="steps with adapters, all resident: milliseconds a step, and the share of the floor reached"
    )
    for heading in ("", "steps", "a step", "base products", "LoRA", "attention", "all else"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for kind, steps in result.steps.items():
        each = 1e3 / steps.num_steps
        parts = [
            f"{part.spent_s * each:.1f}, floor {part.floor_s * each:.1f} ({part.reached:.0%})"
            for part in (steps.base, steps.lora, steps.attention)
        ]
        ends = f"{steps.spent_s * each:.1f} ms", f"{steps.other_s * each:.1f}"
        table.add_row(kind, str(steps.num_steps), ends[0], *parts, ends[1])
    return table


def _notes(result: BenchResult) -> Iterator[str]:
    yield f"toll of the adapters against our base alone: {result.toll:.1%}" + (
        "" if result.config.resident else " (loading them included)"
    )
    yield (
        f"distinct adapters per step {result.distinct_adapters_per_step:.1f}; loads {result.adapter_loads}, "
        f"evictions {result.adapter_evictions}; in the pool at most {result.pool_kv_bytes / 1e6:.0f} MB of KV "
        f"and {result.pool_adapter_bytes / 1e6:.0f} MB of adapters"
    )
    ceilings, floors = result.ceilings, result.floors
    products = ", ".join(f"{rate:.0f} at {rows} rows" for rows, rate in ceilings.gemm_gflop_s.items())
    yield f"ceilings: memory read {ceilings.memory_read_gb_s:.1f} GB/s; products {products} (GFLOP/s)"
    yield (
        f"least time: base products {floors.base_products_s:.2f} s, LoRA {floors.lora_s:.2f} s, "
        f"attention {floors.attention_s:.2f} s"
    )
    for name, peer in result.peers.items():
        yield f"{name}: {_peer_note(result, peer)}"
    for name, figures in result.without.items():
        yield f"without {name}: {_peer_note(result, figures)}"
    if "power" in result.config.distribution:
        yield "power:A draws adapter int(n * u), u with density A u^(A-1): power:1 is uniform"
    if result.forced:
        yield "[bold]The machine was busy: these figures mean little.[/bold]"
    yield f"commit {result.commit}{' with changes' if result.dirty else ''}; {result.machine.cpu}"


def _peer_note(result: BenchResult, peer: PeerResult) -> str:
    share = f"{peer.equal_outputs:.0%} of its answers equal ours"
    few = f"; the first {peer.requests} requests only" if peer.requests < result.config.requests else ""
    return f"{peer.note}{few}; {share}"
