"""What `manylora bench serve` hands back: the record that is kept. Its names are frozen by a test."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from manylora.bench.machine import ForeignLoad, Machine
from manylora.bench.records import rounded
from manylora.bench.serve.config import Kind, ServeBenchConfig
from manylora.bench.serve.metrics import EngineCounts
from manylora.bench.serve.stats import ServeFigures


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

    started: str
    """UTC, ISO 8601."""

    commit: str
    """Of the code that ran: a measurement that was interrupted may go on at another."""

    dirty: bool
    forced: bool


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
    """Of the last row; each row has its own."""

    dirty: bool
    """In any row."""

    started: str
    """UTC, ISO 8601: of the first row."""

    machine: Machine
    forced: bool
    """The machine was busy, in any row, and --force measured all the same."""

    @property
    def commits(self) -> list[str]:
        """Of all rows, in the order of measuring."""
        return list(dict.fromkeys(row.commit for row in sorted(self.rows, key=lambda row: row.started)))

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["config"] = told(self.config)
        rows: Mapping[str, Any] = {"bench": "serve", **rounded(values)}
        return dict(rows)


def told(config: ServeBenchConfig) -> dict[str, Any]:
    """The settings, without keys and without where things lie on somebody's machine."""
    model = Path(config.model).name if Path(config.model).exists() else config.model
    values = asdict(replace(config, model=model, api_key=()))
    return {**values, "out": None, "adapters_folder": None, "url": "a running server" if config.url else ""}


def settings_of(config: ServeBenchConfig) -> dict[str, Any]:
    """What was measured, without what is done with the result: equal settings are one measurement."""
    left_out = ("force", "record", "json", "out", "adapters_folder")
    return {name: value for name, value in told(config).items() if name not in left_out}


def settings_digest(config: ServeBenchConfig) -> str:
    """Short enough for a file name."""
    text = json.dumps(settings_of(config), sort_keys=True)
    return sha256(text.encode()).hexdigest()[:8]


def command_line(config: ServeBenchConfig) -> str:
    """The command that measures this again, with the options that are not the default."""
    values = told(config)
    parts = ["manylora", "bench", "serve", "--model", str(values["model"])]
    for field in fields(config):
        if field.name in ("model", "url", "api_key", "out", "adapters_folder", "record", "json", "force"):
            continue
        value = getattr(config, field.name)
        if value != field.default:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts += [f"--{field.name.replace('_', '-')}", shown]
    return shlex.join(parts)
