"""`manylora bench first-token`: how much later comes the first token when its adapter has never been read?

One request at a time, on an engine that has nothing else to do. Baseline of each cold request is the warm one that
follows it: the same adapter, a prompt as long. What lies between them is looking the name up, reading the file, hashing
and checking it, laying it out and copying it into the pool. The files were written before and the system may hold them
in memory: what a disk takes is not measured.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch

from manylora.bench.adapters import adapter_name, write_adapters
from manylora.bench.ceilings import torch_threads
from manylora.bench.engine import adapter_room, sequence_room, step
from manylora.bench.first_token.config import FirstTokenConfig
from manylora.bench.floor import adapter_bytes
from manylora.bench.machine import (
    ForeignLoad,
    LoadWatch,
    Machine,
    check_idle,
    describe_machine,
    describe_revision,
)
from manylora.bench.records import rounded
from manylora.lora.library import Library
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.models.sites import base_sites
from manylora.text import Engine, EngineConfig, SamplingParams

Report = Callable[[str], None]
"""Told in a few words what begins now."""

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Seconds from handing a request in to its first token."""

    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Self:
        p50, p90, p99 = (float(np.percentile(seconds, p)) for p in PERCENTILES)
        return cls(p50_s=p50, p90_s=p90, p99_s=p99, max_s=max(seconds))


@dataclass(frozen=True, kw_only=True)
class FirstTokenResult:
    """One measurement of one commit on one machine."""

    cold: Waits
    """Of requests whose adapter this process had not read."""

    warm: Waits
    """Of requests whose adapter had just been used."""

    p50_ratio: float
    """Cold over warm, at the same percentile of each."""

    p99_ratio: float
    adapter_bytes: int
    adapter_loads: int
    adapter_evictions: int
    commit: str
    dirty: bool
    started: str
    """UTC, ISO 8601."""

    config: FirstTokenConfig
    machine: Machine
    load: ForeignLoad
    """Of others, during the measurement."""

    forced: bool
    """The machine was busy, and --force measured all the same."""

    def to_json(self) -> dict[str, Any]:
        return {"bench": "first-token", **rounded(asdict(self))}


def run(config: FirstTokenConfig, report: Report = lambda _: None) -> FirstTokenResult:
    """Measure.

    Raises:
        ConfigError: the machine is busy, unless `force`.
    """
    report("looking whether the machine is idle")
    forced = check_idle(force=config.force)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    report("loading the model")
    model = load_model(config.model, dtype=config.dtype)
    with torch_threads(config.num_threads), _engine(model, config, report) as engine:
        report("first requests: they fill the pool")
        pairs, adapters = _Pairs(engine, config, model.config.vocab_size), count()
        while not engine.stats().adapter_evictions:
            pairs.time(next(adapters))
        report(f"{config.samples} pairs of a cold and a warm request")
        before, watch = engine.stats(), LoadWatch()
        times = [pairs.time(next(adapters)) for _ in range(config.samples)]
        load, after = watch.stop(), engine.stats()
    cold, warm = (Waits.of(list(seconds)) for seconds in zip(*times, strict=True))
    revision = describe_revision()
    return FirstTokenResult(
        cold=cold,
        warm=warm,
        p50_ratio=cold.p50_s / warm.p50_s,
        p99_ratio=cold.p99_s / warm.p99_s,
        adapter_bytes=adapter_bytes(model.config, config.rank, config.row_dtype),
        adapter_loads=after.adapter_loads - before.adapter_loads,
        adapter_evictions=after.adapter_evictions - before.adapter_evictions,
        commit=revision.commit,
        dirty=revision.dirty,
        started=started,
        config=replace(config, model=model.config.name),
        machine=describe_machine(),
        load=load,
        forced=forced,
    )


class _Pairs:
    """Times a cold request and the warm one after it."""

    def __init__(self, engine: Engine, config: FirstTokenConfig, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size, self._prompt_tokens = vocab_size, config.prompt_tokens
        self._rng = np.random.default_rng(config.seed)

    def time(self, adapter: int) -> tuple[float, float]:
        """Seconds to the first token of a request that names the adapter first, and of one that names it again."""
        loads = self._engine.stats().adapter_loads
        cold_s, cold_loads = self._time(adapter), self._engine.stats().adapter_loads
        warm_s, warm_loads = self._time(adapter), self._engine.stats().adapter_loads
        assert (cold_loads, warm_loads) == (loads + 1, loads + 1), (
            "a cold request loads, a warm one does not"
        )
        return cold_s, warm_s

    def _time(self, adapter: int) -> float:
        prompt = self._rng.integers(self._vocab_size, size=self._prompt_tokens).tolist()
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        self._engine.submit(prompt, params, adapter_name(adapter))
        while True:
            for output in step(self._engine):
                if output.token_ids:
                    return time.perf_counter() - began


@contextmanager
def _engine(model: Llama, config: FirstTokenConfig, report: Report) -> Iterator[Engine]:
    """An engine whose pool has room for `in_pool` adapters or some more, and whose library holds enough to fill it."""
    pool_bytes = config.in_pool * adapter_room(model, config.rank)
    pool_bytes += sequence_room(model, config.prompt_tokens + 1)
    # So many cannot be in the pool at a time, however well they are packed.
    num_adapters = (
        pool_bytes // adapter_bytes(model.config, config.rank, config.row_dtype) + 1 + config.samples
    )
    with TemporaryDirectory(prefix="manylora-first-token-") as folder:
        report(f"writing {num_adapters} adapters")
        write_adapters(Path(folder), base_sites(model.config), num_adapters, [config.rank], config.seed)
        engine_config = EngineConfig(
            pool_bytes=pool_bytes, prefix_caching=False, adapter_dtype=config.adapter_dtype
        )
        with torch.inference_mode(), Engine(model, None, Library(folder), engine_config) as engine:
            engine.warm_up()
            gc.collect()
            gc.freeze()  # as the server does: server/engine_process.py
            try:
                yield engine
            finally:
                gc.unfreeze()
