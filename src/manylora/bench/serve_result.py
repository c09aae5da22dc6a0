"""What `manylora bench serve` hands back: the record that is kept. Its names are frozen by a test."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from manylora.bench.machine import ForeignLoad, Machine
from manylora.bench.result import rounded
from manylora.bench.serve_config import Kind, ServeBenchConfig
from manylora.bench.serve_metrics import EngineCounts
from manylora.bench.serve_stats import ServeFigures


@dataclass(frozen=True, kw_only=True)
class ServeRun:
    """One trace that is sent to one server."""

    policy: str
    """Empty: the server's own."""

    adapters: int
    load: float | None
    """Share of the capacity; None where the rate was given."""

    rate: float
    """Requests a second."""

    without_hog: bool = False

    @property
    def label(self) -> str:
        """Who is who in a plot."""
        parts = [self.policy or "server", f"{self.adapters} adapters"]
        parts += [f"{self.load:g}x capacity" if self.load else f"{self.rate:g}/s"]
        return ", ".join([*parts, "without the hog"] if self.without_hog else parts)


@dataclass(frozen=True, kw_only=True)
class ServeRow:
    """A run and what came of it."""

    run: ServeRun
    figures: ServeFigures
    engine: EngineCounts | None
    """None: the server does not tell."""

    others: ForeignLoad
    """What others took of the machine meanwhile; a server that was not started here is one of them."""


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What reading the distinct adapters of a step can explain."""

    memory_read_gb_s: float
    """Measured just before, all cores together."""

    adapter_bytes: int
    """Of one adapter, the mean over their ranks."""

    def read_s(self, distinct_adapters: float) -> float:
        """Least time in which a step can read so many."""
        return distinct_adapters * self.adapter_bytes / (1e9 * self.memory_read_gb_s)


@dataclass(frozen=True, kw_only=True)
class ServeResult:
    """One measurement of one commit on one machine."""

    kind: Kind
    capacity_per_s: float | None
    """Requests a second of the closed loop; None where rates were given."""

    rows: tuple[ServeRow, ...]
    explained: Explained | None
    """Of a curve over the number of adapters."""

    config: ServeBenchConfig
    command: str
    commit: str
    dirty: bool
    started: str
    """UTC, ISO 8601."""

    machine: Machine
    forced: bool
    """The machine was busy, and --force measured all the same."""

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["config"] = told(self.config)
        rows: Mapping[str, Any] = {"bench": "serve", **rounded(values)}
        return dict(rows)


def told(config: ServeBenchConfig) -> dict[str, Any]:
    """The settings, without keys and without where things lie on somebody's machine."""
    model = Path(config.model).name if Path(config.model).exists() else config.model
    values = asdict(replace(config, model=model, api_key=()))
    return {**values, "out": None, "url": "a running server" if config.url else ""}


def command_line(config: ServeBenchConfig) -> str:
    """The command that measures this again, with the options that are not the default."""
    values = told(config)
    parts = ["manylora", "bench", "serve", "--model", str(values["model"])]
    for field in fields(config):
        if field.name in ("model", "url", "api_key", "out", "record", "json", "force"):
            continue
        value = getattr(config, field.name)
        if value != field.default:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts += [f"--{field.name.replace('_', '-')}", shown]
    return shlex.join(parts)
