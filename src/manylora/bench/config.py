"""Settings of the text benchmark. Each field is an option of `manylora bench text` under the same name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from manylora.bench.workload import Distribution
from manylora.errors import ConfigError

PEERS = ("transformers", "peft", "peft-switch")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure: one model, one trace, and whom to measure beside."""

    model: str
    """Base model: a folder, a hub id or a GGUF file."""

    adapters: int = 128
    """Adapters in the library, each of its own content; 0 measures the base alone."""

    rank: tuple[int, ...] = (16,)
    """Ranks, dealt out to the adapters in turn."""

    requests: int = 128
    """Requests, all handed in at the start."""

    prompt_tokens: int = 64
    """Random tokens of each prompt."""

    output_tokens: int = 64
    """Tokens of each answer; nothing ends one earlier."""

    distribution: str = "uniform"
    """Which adapters requests name: uniform, power:A (1 is uniform, towards 0 fewer adapters), distinct, identical."""

    mixture: int = 1
    """Adapters that each request names, with weights if more than one."""

    dtype: str = "float32"
    """Of the base weights and of KV; adapters are bfloat16."""

    max_batch: int = 128
    """Most requests that our engine runs at a time."""

    peer: tuple[str, ...] = ("none",)
    """Measured beside, in turns with us: none, or some of transformers (base only), peft (mixed batch), peft-switch."""

    seed: int = 0
    """Of prompts, adapters and choices."""

    repeats: int = 3
    """Runs of each; medians are reported, with least and most."""

    threads: int = 0
    """Threads of everybody; 0: one for each core that this process may use."""

    pool_bytes: int = 0
    """Bytes of our pool; 0: enough for all requests at a time and all their adapters."""

    resident: bool = False
    """Load our adapters before the clock starts, as the peers always do; otherwise loading is part of the time."""

    force: bool = False
    """Measure even if other processes load the machine; the row is marked."""

    record: bool | None = None
    """Keep the row in benchmarks/records: yes, no, or (neither) if the tree is clean and the machine was idle."""

    json: bool = False
    """Print the JSON object alone."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.rank or min(self.rank) < 1:
            raise ConfigError(f"rank must list ranks of at least 1, got {list(self.rank)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype '{self.dtype}'; known: {', '.join(DTYPES)}")
        if unknown := [name for name in self.peers if name not in PEERS]:
            raise ConfigError(f"unknown peers {unknown}; known: none, {', '.join(PEERS)}")
        Distribution.parse(self.distribution)
        if self.adapters and self.mixture > self.adapters:
            raise ConfigError(f"mixtures of {self.mixture} cannot be drawn from {self.adapters} adapters")
        if not self.adapters and set(self.peers) - {"transformers"}:
            raise ConfigError(
                "peft and peft-switch need adapters; with 0 adapters the only peer is transformers"
            )

    def rank_of(self, adapter: int) -> int:
        """The rank of adapter number `adapter`."""
        return self.rank[adapter % len(self.rank)]

    @property
    def peers(self) -> tuple[str, ...]:
        """Who is measured beside us; each once."""
        return tuple(name for name in dict.fromkeys(self.peer) if name != "none")

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


_LEAST = {
    "adapters": 0,
    "requests": 1,
    "prompt_tokens": 1,
    "output_tokens": 1,
    "mixture": 1,
    "max_batch": 1,
    "repeats": 1,
    "threads": 0,
    "pool_bytes": 0,
}
