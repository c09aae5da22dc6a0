"""Settings of the first-token benchmark. Each field is an option of `manylora bench first-token` of the same name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from manylora.bench.settings import DTYPES
from manylora.errors import ConfigError
from manylora.text.config import ADAPTER_DTYPES


@dataclass(frozen=True, kw_only=True)
class FirstTokenConfig:
    """What to measure."""

    model: str
    """Base model: a folder, a hub id or a GGUF file."""

    samples: int = 200
    """Adapters that are named for the first time, one after the other; each is named a second time right after."""

    rank: int = 8
    """Of every adapter."""

    prompt_tokens: int = 64
    """Random tokens of each prompt; the cold and the warm request of a pair have prompts of their own."""

    in_pool: int = 32
    """Adapters that find room in the pool, at least. It is filled before the clock starts: then every load evicts, as
    in a server that has run for a while."""

    dtype: str = "float32"
    """Of the base weights and of KV; adapters are bfloat16. int8: of the base's products; all else float32."""

    adapter_dtype: str = "auto"
    """As the engine's: auto leaves adapters in bfloat16, int8 rounds them as they are laid out."""

    threads: int = 0
    """0: one for each core that this process may use."""

    seed: int = 0
    """Of prompts and adapters."""

    force: bool = False
    """Measure even if other processes load the machine; the record is marked."""

    record: bool | None = None
    """Keep the record in benchmarks/records: yes, no, or (neither) if the tree is clean and the machine was idle."""

    json: bool = False
    """Print the JSON object alone."""

    def __post_init__(self) -> None:
        for name in ("samples", "rank", "prompt_tokens", "in_pool"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ConfigError(f"threads must be at least 0, got {self.threads}")
        for name, known in (("dtype", DTYPES), ("adapter_dtype", ADAPTER_DTYPES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name} '{getattr(self, name)}'; known: {', '.join(known)}")

    @property
    def row_dtype(self) -> str:
        """Of adapters in the pool."""
        return "bfloat16" if self.adapter_dtype == "auto" else self.adapter_dtype

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))
