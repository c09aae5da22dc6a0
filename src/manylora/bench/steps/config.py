"""Settings of the step benchmark. Each field is an option of `manylora bench steps` under the same name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from manylora.bench.settings import DTYPES
from manylora.errors import ConfigError
from manylora.models.demo_model import DEMO_MODEL


@dataclass(frozen=True, order=True)
class Point:
    """A decode step: so many sequences, each on an adapter of its own."""

    batch: int
    context: int
    """Tokens of each sequence, the mean over the steps that are timed."""

    rank: int


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """Which steps to time: three tables, each with one number that changes and two that stay."""

    model: str = DEMO_MODEL
    """Base model: a folder, a hub id or a GGUF file."""

    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Sequences of a step."""

    context: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """Tokens that each sequence sees."""

    rank: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Of every sequence's adapter, on all seven linears, bfloat16."""

    at_batch: int = 8
    """Sequences where context or rank changes."""

    at_context: int = 64
    """Context where batch or rank changes."""

    at_rank: int = 8
    """Rank where batch or context changes."""

    dtype: str = "float32"
    """Of base weights and KV. int8: of the base's products, all else float32."""

    steps: int = 16
    """Steps that are timed at each point and repeat."""

    repeats: int = 3
    """Rounds over all points; medians of their medians are reported, with least and most."""

    threads: int = 0
    """Threads of torch and of the kernels; 0: one for each core that this process may use."""

    seed: int = 0
    """Of prompts and adapters."""

    force: bool = False
    """Measure even if other processes load the machine; the row is marked."""

    record: bool | None = None
    """Keep the row in benchmarks/records: yes, no, or (neither) if the tree is clean and the machine was idle."""

    json: bool = False
    """Print the JSON object alone."""

    def __post_init__(self) -> None:
        for name in ("batch", "context", "rank"):
            values = getattr(self, name)
            if len(set(values)) < 3 or min(values) < 1:
                raise ConfigError(
                    f"{name} must list three numbers of at least 1, or no line can be told, got {list(values)}"
                )
        for name in ("at_batch", "at_context", "at_rank", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ConfigError(f"threads must be at least 0, got {self.threads}")
        if min(*self.context, self.at_context) <= self.steps // 2:
            raise ConfigError(
                f"a context must be longer than half of the {self.steps} steps that are timed around it"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype '{self.dtype}'; known: {', '.join(DTYPES)}")

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    def tables(self) -> dict[str, dict[int, Point]]:
        """What changes to the points of its table, by its value, ascending."""
        return {
            "batch": {n: Point(n, self.at_context, self.at_rank) for n in sorted({*self.batch})},
            "context": {n: Point(self.at_batch, n, self.at_rank) for n in sorted({*self.context})},
            "rank": {n: Point(self.at_batch, self.at_context, n) for n in sorted({*self.rank})},
        }
