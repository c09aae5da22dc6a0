"""Settings of the server benchmark. Each field is an option of `manylora bench serve` under the same name."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from manylora.bench.serve.workload import Workload
from manylora.errors import ConfigError

Kind = Literal["policies", "adapters", "tenants"]

BENCH_POLICIES = {
    "lifo": "manylora.bench.serve.policies:LastInFirstOut",
    "abort": "manylora.bench.serve.policies:EarlyAbort",
}
"""Policies to compare with, which the server does not offer by a name: where their classes are."""

_OF_A_STARTED_SERVER = ("policies", "rank", "serve_options", "adapters_folder")


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """A workload, and the servers that it is sent to."""

    model: str
    """Base model: a folder, a hub id or a GGUF file. With `url`, the one that runs there: its config says how many
    tokens there are."""

    url: str = ""
    """Measure the server that runs there. Empty: start `manylora serve` for each run, and end it."""

    api_key: tuple[str, ...] = ()
    """With `url`: key of every request, or one for each tenant."""

    policies: tuple[str, ...] = ()
    """Run each: fcfs, cluster, fair, slo, and lifo and abort (S-LoRA's) to compare with. Empty: the server's own."""

    serve_options: str = ""
    """More options of `manylora serve`, as on its command line."""

    adapters: int = 200
    """Adapters that requests name; 0: the base. With `url` the first so many of its list, otherwise random ones."""

    rows: tuple[int, ...] = ()
    """A run for each of these numbers of adapters, in place of `adapters`; begin with 0 to see what adapters cost."""

    rank: tuple[int, ...] = (16,)
    """Ranks of the random adapters, dealt out in turn."""

    adapters_folder: Path | None = None
    """Where the random adapters lie; those that do not yet are written there. None: a folder that goes with the run."""

    rate: tuple[float, ...] = ()
    """A run for each rate, in requests a second. Empty: `load` times the capacity, which is measured first."""

    load: tuple[float, ...] = ()
    """A run for each share of the capacity. Empty: 0.5, 1 and 2; with `rows` or `tenants`, 1."""

    duration_s: float = 60.0
    """Length of the trace. In overload the queue grows all the while: compare equal lengths only."""

    cv: float = 1.0
    """Coefficient of variation of the times between arrivals; 1 is Poisson's process, above it is burstier."""

    alpha: float = 1.0
    """Which adapters requests name: 1 is uniform, towards 0 most name the first ones."""

    input_range: tuple[int, int] = (8, 512)
    """Tokens of a prompt: at least the first, fewer than the second."""

    output_range: tuple[int, int] = (8, 512)
    """Tokens of an answer, likewise."""

    tenants: int = 1
    """Tenants, each with a stream and a key of its own. Of several, tenant 0 is the hog, and each run is made without
    it too."""

    hog: float = 10.0
    """How many times as much the hog sends as each of the others."""

    slo_s: float = 6.0
    """First token within this: S-LoRA's objective. The policies slo and abort keep it as the deadline."""

    seed: int = 42
    """Of everything that is drawn."""

    capacity_s: float = 60.0
    """Length of the closed loop that measures the capacity; its first third does not count."""

    concurrency: int = 128
    """Requests that the closed loop keeps under way: as many as the server runs at a time, or more."""

    timeout_s: float = 600.0
    """A request that has not ended by then has failed."""

    drain_s: float | None = None
    """So long after the last arrival, cut off who has no token yet; who is late already. None: wait for everybody."""

    out: Path | None = None
    """Folder for result.json, outcomes.jsonl and the plots, and for the runs that are done of a measurement that is
    not: the same command goes on with it. None: nothing is written."""

    force: bool = False
    """Measure even if other processes load the machine; the result is marked."""

    record: bool | None = None
    """Keep the result in benchmarks/records: yes, no, or (neither) if the tree is clean and the machine was idle."""

    json: bool = False
    """Print the JSON object alone."""

    def __post_init__(self) -> None:
        for name, least in {"adapters": 0, "tenants": 1, "concurrency": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("duration_s", "cv", "slo_s", "capacity_s", "timeout_s", "alpha"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.hog < 1:
            raise ConfigError(f"hog must be at least 1, got {self.hog:g}")
        for name in ("input_range", "output_range"):
            if len(given := getattr(self, name)) != 2 or not 1 <= given[0] < given[1]:
                raise ConfigError(f"{name} must be two numbers, 1 <= first < second, got {list(given)}")
        if not self.rank or min(self.rank) < 1:
            raise ConfigError(f"rank must list ranks of at least 1, got {list(self.rank)}")
        if any(not value > 0 for value in (*self.rate, *self.load)) or any(n < 0 for n in self.rows):
            raise ConfigError("rate and load must be above 0, rows 0 or more")
        if self.drain_s is not None and self.drain_s < self.slo_s:
            raise ConfigError(
                f"drain_s must be at least slo_s ({self.slo_s:g}), got {self.drain_s:g}: else some who "
                "are cut off could still be in time"
            )
        self._check_together()

    def _check_together(self) -> None:
        if self.rate and self.load:
            raise ConfigError("rate says requests a second, load a share of the capacity: give one of them")
        if self.rows and (self.tenants > 1 or len(self.loads or self.rate) > 1):
            raise ConfigError(
                "rows is a curve over the number of adapters, at one rate or load and of one tenant"
            )
        if not self.url and self.api_key:
            raise ConfigError("api_key is for a server that runs already; one that is started gets its own")
        if self.url and (given := [name for name in _OF_A_STARTED_SERVER if self._is_given(name)]):
            raise ConfigError(f"the server at {self.url} runs as it is; leave out {', '.join(given)}")
        if len(self.api_key) not in (0, 1, self.tenants):
            raise ConfigError(f"give one api_key or {self.tenants}, one a tenant; got {len(self.api_key)}")

    def _is_given(self, name: str) -> bool:
        (default,) = (field.default for field in fields(self) if field.name == name)
        return bool(getattr(self, name) != default)

    @property
    def kind(self) -> Kind:
        """What the runs differ in."""
        return "adapters" if self.rows else "tenants" if self.tenants > 1 else "policies"

    @property
    def loads(self) -> tuple[float, ...]:
        """Shares of the capacity to run at; empty if rates were given."""
        if self.rate:
            return ()
        return self.load or ((0.5, 1.0, 2.0) if self.kind == "policies" else (1.0,))

    @property
    def num_adapters(self) -> int:
        """Most that a run names."""
        return max(self.rows, default=self.adapters)

    @property
    def options(self) -> list[str]:
        return shlex.split(self.serve_options)

    def workload(self, rate: float, num_adapters: int, vocab_size: int) -> Workload:
        return Workload(
            rate=rate,
            duration_s=self.duration_s,
            cv=self.cv,
            alpha=self.alpha,
            num_adapters=num_adapters,
            prompt_range=self.input_range,
            output_range=self.output_range,
            vocab_size=vocab_size,
            seed=self.seed,
        )
