"""What a benchmark hands back: the row that is kept. Its names are frozen by a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Self

from manylora.bench.ceilings import Ceilings
from manylora.bench.machine import ForeignLoad, Machine
from manylora.bench.records import rounded
from manylora.bench.text.config import BenchConfig
from manylora.bench.text.pass_floor import StepShare
from manylora.bench.text.timeline import RunFigures


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians over the runs of one contender."""

    tokens_per_s: float
    requests_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    peak_rss_bytes: int

    tokens_per_s_range: tuple[float, float]
    """Least and most of the runs."""

    @classmethod
    def of(cls, runs: Sequence[RunFigures]) -> Self:
        rates = [run.tokens_per_s for run in runs]
        return cls(
            tokens_per_s=median(rates),
            requests_per_s=median(run.requests_per_s for run in runs),
            ttft_p50_s=median(run.ttft_p50_s for run in runs),
            ttft_p99_s=median(run.ttft_p99_s for run in runs),
            tpot_p50_s=median(run.tpot_p50_s for run in runs),
            peak_rss_bytes=max(run.peak_rss_bytes for run in runs),
            tokens_per_s_range=(min(rates), max(rates)),
        )


@dataclass(frozen=True, kw_only=True)
class PeerResult(Figures):
    """A peer's figures, and what is to be known about them."""

    batch: int
    """The best of those tried."""

    requests: int
    """Of the trace, how many it was given."""

    speedup: float
    """Our tokens_per_s over its: our base alone beside a peer that runs no adapters, else ours with adapters."""

    equal_outputs: float
    """Share of its answers that equal ours token by token, in the same comparison."""

    note: str


@dataclass(frozen=True, kw_only=True)
class Floors:
    """Throughput that the measured ceilings allow, and the share of it that was reached."""

    tokens_per_s: float
    base_tokens_per_s: float
    reached: float
    base_reached: float
    base_products_s: float
    """Of the trace with adapters, least time of each kind of work."""
    lora_s: float
    attention_s: float


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """One measurement of one commit on one machine."""

    tokens_per_s: float
    """Output tokens a second with adapters, loading included unless `resident`; as all figures a median."""
    requests_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tokens_per_s_range: tuple[float, float]
    base_tokens_per_s: float
    """The same prompts with no adapter through the same engine, in turns with the runs above."""
    base_tokens_per_s_range: tuple[float, float]
    toll: float
    """1 - tokens_per_s / base_tokens_per_s."""
    distinct_adapters_per_step: float
    pool_kv_bytes: int
    """Most that KV held at one time; likewise adapters."""
    pool_adapter_bytes: int
    adapter_loads: int
    adapter_evictions: int
    peak_rss_bytes: int
    """Of the engine's process."""
    dtype: str
    threads: int
    commit: str
    dirty: bool
    started: str
    """UTC, ISO 8601."""
    peers: Mapping[str, PeerResult]
    without: Mapping[str, PeerResult]
    """Our engine without one of its ideas: what is left out to its figures."""
    ceilings: Ceilings
    floors: Floors
    steps: Mapping[str, StepShare]
    """Kind of step, prefill or decode, to what its work took and must take; adapters resident."""
    config: BenchConfig
    machine: Machine
    load: ForeignLoad
    """Of others, during the runs."""
    forced: bool
    """The machine was busy, and --force measured all the same."""

    def to_json(self) -> dict[str, Any]:
        return {"bench": "text", **rounded(asdict(self))}
