"""A result of `manylora bench serve` as tables for people, and as the one line that is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from manylora.bench.serve.result import ServeResult, ServeRow
from manylora.bench.serve.stats import Latency, TenantFigures


def json_line(result: ServeResult) -> str:
    """One JSON object without a line break."""
    return json.dumps(result.to_json(), separators=(",", ":"))


def print_result(result: ServeResult, console: Console | None = None) -> None:
    """Print every run, what the kind of measurement asks beside it, and what the figures rest on."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=180))
    console.print(_runs_table(result))
    if result.kind == "tenants":
        console.print(_tenants_table(result))
    if result.kind == "adapters":
        console.print(_adapters_table(result))
    for line in _notes(result):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def hog_effect(result: ServeResult, policy: str) -> list[tuple[int, float, float]]:
    """(tenant, p95 first-token latency with the hog, without it) of every tenant but the hog that has both."""
    with_hog, without = (_tenants_of(result, policy, without_hog) for without_hog in (False, True))
    pairs = ((tenant, with_hog.get(tenant), alone) for tenant, alone in without.items())
    return [
        (tenant, both.ttft.p95_s, alone.ttft.p95_s)
        for tenant, both, alone in pairs
        if both is not None and both.ttft.p95_s is not None and alone.ttft.p95_s is not None
    ]


def _tenants_of(result: ServeResult, policy: str, without_hog: bool) -> dict[int, TenantFigures]:
    """Of the run at the highest rate."""
    rows = [row for row in result.rows if (row.run.policy, row.run.without_hog) == (policy, without_hog)]
    row = max(rows, key=lambda row: row.run.rate)
    return {tenant.tenant: tenant for tenant in row.figures.tenants}


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    for number, heading in enumerate(("policy", "load", *headings)):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _names(row: ServeRow) -> tuple[str, str]:
    run = row.run
    policy = (run.policy or "its own") + (", without the hog" if run.without_hog else "")
    return policy, f"{run.load:g}x" if run.load else f"{run.rate:g}/s"


def _runs_table(result: ServeResult) -> Table:
    config = result.config
    table = _table(
        f"cv {config.cv:g}, alpha {config.alpha:g} (1 is uniform), prompts {_range(config.input_range)}, answers "
        f"{_range(config.output_range)} tokens, {config.duration_s:g} s, first token within {config.slo_s:g} s",
        "adapters",
        "requests",
        "sent\n1/s",
        "finished\n1/s",
        "tokens/s",
        "in time",
        "satis-\nfaction",
        "first token, s\nmean / p50 / p95 / p99",
        "per token, ms\np50 / p95",
        "429 / 503\n/ cut / failed",
        "Jain,\nadapters",
    )
    for row in result.rows:
        figures = row.figures
        table.add_row(
            *_names(row),
            str(row.run.adapters),
            str(figures.requests),
            f"{row.run.rate:.2f}",
            f"{figures.requests_per_s:.2f}",
            f"{figures.tokens_per_s:.1f}",
            f"{figures.attainment:.1%}\n{_shares(figures.attainment_interval)}",
            f"{figures.satisfaction:.2f}",
            _seconds(figures.ttft),
            f"{_ms(figures.tpot.p50_s)} / {_ms(figures.tpot.p95_s)}",
            f"{figures.refused_429} / {figures.refused_503}\n/ {figures.cut_off} / {figures.failed}",
            _number(figures.fairness_adapters, 2),
        )
    return table


def _tenants_table(result: ServeResult) -> Table:
    table = _table(
        f"first token of {result.config.tenants} tenants, the hog sends {result.config.hog:g} times as much as another",
        "Jain,\ntenants",
        "the hog: in time,\np95 s",
        "the others: p95 s\nwith the hog",
        "without",
        "ratio,\nworst tenant",
    )
    for policy in dict.fromkeys(row.run.policy for row in result.rows):
        (row, *_) = [row for row in result.rows if row.run.policy == policy and not row.run.without_hog]
        hog = row.figures.tenants[0]
        effect = hog_effect(result, policy)
        worst = max(effect, key=lambda one: one[1] / one[2], default=None)
        table.add_row(
            *_names(row),
            _number(row.figures.fairness_tenants, 3),
            f"{hog.attainment:.1%}, {_number(hog.ttft.p95_s, 2)}",
            _number(None if worst is None else worst[1], 2),
            _number(None if worst is None else worst[2], 2),
            _number(None if worst is None else worst[1] / worst[2], 2),
        )
    return table


def _adapters_table(result: ServeResult) -> Table:
    table = _table(
        "steps, beside the time in which the adapters of a step can be read",
        "adapters",
        "finished\n1/s",
        "distinct adapters\na step",
        "loads",
        "evictions",
        "step, ms",
        "more than the\nfirst row, ms",
        "reading its\nadapters, ms",
    )
    first = _step_s(result.rows[0])
    for row in result.rows:
        step_s, distinct = (
            _step_s(row),
            None if row.engine is None else row.engine.distinct_adapters_per_step,
        )
        read_s = None if distinct is None or not result.explained else result.explained.read_s(distinct)
        table.add_row(
            *_names(row),
            str(row.run.adapters),
            f"{row.figures.requests_per_s:.2f}",
            _number(distinct, 1),
            "-" if row.engine is None else str(row.engine.adapter_loads),
            "-" if row.engine is None else str(row.engine.adapter_evictions),
            _ms(step_s),
            _ms(None if step_s is None or first is None else step_s - first),
            _ms(read_s),
        )
    return table


def _notes(result: ServeResult) -> Iterator[str]:
    if result.capacity_per_s is not None:
        yield (
            f"capacity: {result.capacity_per_s:.2f} requests/s, {result.config.concurrency} at a time in a closed loop "
            f"under {result.rows[0].run.policy or 'the server as it is'} with {result.rows[0].run.adapters} adapters"
        )
    if result.explained is not None:
        yield (
            f"memory is read at {result.explained.memory_read_gb_s:.1f} GB/s; an adapter has "
            f"{result.explained.adapter_bytes / 1e6:.2f} MB"
        )
    costs = [row.figures.generator_us_per_token for row in result.rows]
    yield (
        f"load generator: {_number(max((cost for cost in costs if cost), default=None), 0)} us of processor time a "
        f"token at most, {max(row.figures.generator_cores for row in result.rows):.2f} cores; p99 of requests sent "
        f"{1e3 * max(row.figures.late_p99_s for row in result.rows):.0f} ms late"
    )
    for row in result.rows:
        for error, count in row.figures.errors.items():
            yield f"{row.run.label}: {count} x {error}"
    if result.forced:
        yield "The machine was busy: these figures mean little."
    yield f"{result.command}"
    yield f"commit {', '.join(result.commits)}{' with changes' if result.dirty else ''}; {result.machine.cpu}"


def _step_s(row: ServeRow) -> float | None:
    return None if row.engine is None else row.engine.step_s


def _range(given: tuple[int, ...]) -> str:
    return f"{given[0]} to {given[1] - 1}"


def _shares(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f}%"


def _seconds(latency: Latency) -> str:
    values = (latency.mean_s, latency.p50_s, latency.p95_s, latency.p99_s)
    return " / ".join(_number(value, 2) for value in values)


def _ms(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e3 * seconds, 1)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
