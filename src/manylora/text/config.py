"""Settings of the text engine."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from manylora.errors import ConfigError

KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What `EngineConfig.kv_cache_dtype` may be."""

ADAPTER_DTYPES = ("auto", "int8")
"""What `EngineConfig.adapter_dtype` may be."""


def kv_dtype_name(dtype: str, kv_cache_dtype: str = "auto") -> str:
    """What keys and values are stored in.

    Args:
        dtype: the model's; "int8" where its base products are of eight bits.
        kv_cache_dtype: as in EngineConfig.
    """
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    # Products of eight bits err more than a rounded key does, and half the bytes are read in half the time.
    return "bfloat16" if dtype == "int8" else dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much memory the engine takes, what lies in it, and how much is done in a step. Device and dtype of what is
    computed are the model's."""

    pool_bytes: int = 1 << 30
    """Bytes of the one pool, which KV and adapters share."""

    page_tokens: int | None = None
    """Tokens whose KV one page holds; None chooses for the model's shapes, so that adapters waste little."""

    kv_cache_dtype: str = "auto"
    """How KV lies in the pool: float32, bfloat16 or float16. auto: as the model computes, but bfloat16 where its base
    products are int8."""

    adapter_dtype: str = "auto"
    """How adapters lie in the pool. auto: as in their files; int8: each rank row in eight bits with a scale of its own,
    in half the memory of two-byte floats."""

    max_batch_tokens: int = 512
    """Most tokens in one forward pass, of prefill and decode together."""

    max_num_seqs: int = 128
    """Most sequences that run at a time."""

    max_waiting: int | None = None
    """Most sequences that wait for their turn; a request beyond that is refused. None: any number."""

    prefix_caching: bool = True
    """Share KV between requests with equal beginnings and equal mixtures."""

    max_pending_loads: int = 32
    """Most adapters being read, or read and waiting for pages, at a time; bounds host memory."""

    load_threads: int = 4
    """Threads that read adapters, so that a slow one holds up no other."""

    debug: bool = False
    """After each step check every manager's integrity, and fill free pages with NaN so that a stray read shows."""

    def __post_init__(self) -> None:
        for name, known in (("kv_cache_dtype", KV_CACHE_DTYPES), ("adapter_dtype", ADAPTER_DTYPES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        for name in ("pool_bytes", "max_batch_tokens", "max_num_seqs", "max_pending_loads", "load_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("page_tokens", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 or none, got {value}")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_num_seqs ({self.max_num_seqs}): "
                "every running sequence decodes one token a step"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EngineConfig":
        """Make a config from names and values.

        Raises:
            ConfigError: a name that is no setting; says which are.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(name for name in values if name not in known)
        if unknown:
            raise ConfigError(f"unknown engine settings {unknown}; known: {known}")
        return cls(**values)
