"""Settings of the kernel benchmark. Each field is an option of `manylora bench kernels` under the same name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from manylora.errors import ConfigError
from manylora.models.demo_model import DEMO_MODEL

KERNELS = (
    "shrink",
    "expand",
    "lora",
    "decode",
    "prefill",
    "kv_write",
    "rms_norm",
    "rope",
    "gated_unit",
    "int8_product",
    "product",
)
KV_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which kernels to measure, on batches of which shape."""

    model: str = DEMO_MODEL
    """Base model whose shapes are measured: a folder, a hub id or a GGUF file; its weights are not read."""

    kernels: tuple[str, ...] = KERNELS
    """Which kernels; "lora" is shrink and expand one after the other, over all sites of a layer."""

    lora: tuple[str, ...] = ("512:32:64", "32:32:8", "128:128:8", "128:1:8")
    """Batches of shrink, expand and lora, as rows:adapters:rank; adapters are bfloat16, on all linears."""

    decode: tuple[str, ...] = ("128:96", "32:1024", "8:4096")
    """Batches of attention with one new token each, as sequences:context."""

    prefill: tuple[str, ...] = ("8:64", "1:512")
    """Batches of attention in which all tokens are new, as sequences:tokens."""

    rows: tuple[int, ...] = (32, 128, 512)
    """Rows of the other kernels."""

    kv_dtype: str = "float32"
    """Of keys and values in the pages."""

    repeats: int = 5
    """Turns of each implementation; medians are reported, with least and most."""

    sample_s: float = 0.2
    """Seconds that a turn calls the kernel for, one layer after the other; one call at least."""

    threads: int = 0
    """Threads of everybody; 0: one for each core that this process may use."""

    working_set_bytes: int = 0
    """Bytes that an implementation goes through before it comes back; 0: four times the last-level cache."""

    seed: int = 0
    """Of adapters, activations and the order of pages."""

    force: bool = False
    """Measure even if other processes load the machine; the row is marked."""

    record: bool | None = None
    """Keep the row in benchmarks/records: yes, no, or (neither) if the tree is clean and the machine was idle."""

    json: bool = False
    """Print the JSON object alone."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.kernels if name not in KERNELS]:
            raise ConfigError(f"unknown kernels {unknown}; known: {', '.join(KERNELS)}")
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"unknown kv_dtype '{self.kv_dtype}'; known: {', '.join(KV_DTYPES)}")
        for name, least in (("repeats", 1), ("threads", 0), ("working_set_bytes", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.sample_s <= 0:
            raise ConfigError(f"sample_s must be above 0, got {self.sample_s}")
        if not self.rows or min(self.rows) < 1:
            raise ConfigError(f"rows must list numbers of at least 1, got {list(self.rows)}")
        for name, letters in (
            ("lora", "rows:adapters:rank"),
            ("decode", "sequences:context"),
            ("prefill", "sequences:tokens"),
        ):
            for text in getattr(self, name):
                numbers_of(name, letters, text)
        for text in self.lora:
            rows, adapters, _ = numbers_of("lora", "rows:adapters:rank", text)
            if rows < adapters:
                raise ConfigError(
                    f"lora '{text}' has {rows} rows for {adapters} adapters; each needs a row at least"
                )

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def numbers_of(option: str, letters: str, text: str) -> tuple[int, ...]:
    """Read "512:32:64" as the numbers that `letters` name.

    Raises:
        ConfigError: another number of them, or one below 1.
    """
    parts = text.split(":")
    if len(parts) != letters.count(":") + 1 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option} takes {letters}, each at least 1, got '{text}'")
    return tuple(map(int, parts))
