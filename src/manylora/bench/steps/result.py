"""What the step benchmark hands back: the row that is kept, as a table for people, and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from manylora.bench.machine import ForeignLoad, Machine
from manylora.bench.records import rounded
from manylora.bench.steps.config import StepsConfig
from manylora.bench.steps.fit import StepTable


@dataclass(frozen=True, kw_only=True)
class StepsResult:
    """One measurement of one commit on one machine."""

    tables: Mapping[str, StepTable]
    """batch, context and rank."""

    sizes: Mapping[str, Any]
    """Of the model, for who counts what its steps do (cost.py)."""

    threads: int
    config: StepsConfig
    command: str
    commit: str
    dirty: bool
    started: str
    """UTC, ISO 8601."""

    machine: Machine
    load: ForeignLoad
    """Of others, during the runs."""

    forced: bool
    """The machine was busy, and --force measured all the same."""

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"bench": "steps", **rounded(asdict(self))}
        return row


def print_result(result: StepsResult, console: Console | None = None) -> None:
    """Print each table with its line."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=130))
    for name, table in result.tables.items():
        console.print(_table(result.config, name, table))
    if result.forced:
        console.print("[bold]The machine was busy: these figures mean little.[/bold]")
    changed = " with changes" if result.dirty else ""
    console.print(
        f"{result.config.model}, {result.config.dtype}, {result.threads} threads; commit {result.commit}{changed}; "
        f"{result.machine.cpu}",
        highlight=False,
        soft_wrap=True,
    )


def _table(config: StepsConfig, name: str, table: StepTable) -> Table:
    fixed = ", ".join(
        f"{other} {getattr(config, f'at_{other}')}"
        for other in ("batch", "context", "rank")
        if other != name
    )
    shown = Table(
        title=f"a decode step at {fixed}: {1e3 * table.intercept_s:.2f} ms + {1e3 * table.slope_s:.4f} ms x {name}"
    )
    for heading in (name, "a step", "least - most", "the line", "off by"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for point in table.points:
        shown.add_row(
            str(point.value),
            f"{1e3 * point.step_s:.2f} ms",
            f"{1e3 * point.least_s:.2f} - {1e3 * point.most_s:.2f}",
            f"{1e3 * point.fit_s:.2f} ms",
            f"{point.residual:+.1%}",
        )
    return shown
