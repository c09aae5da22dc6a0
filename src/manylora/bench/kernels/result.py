"""What the kernel benchmark hands back: the row that is kept. Its names are frozen by a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from manylora.bench.ceilings import Ceilings
from manylora.bench.kernels.case import Case, Times
from manylora.bench.kernels.config import KernelsConfig
from manylora.bench.machine import ForeignLoad, Machine
from manylora.bench.records import rounded


@dataclass(frozen=True, kw_only=True)
class KernelFigures:
    """One kernel on one shape. Rates and shares are of the median of ours."""

    kernel: str
    shape: str
    num_bytes: int
    flops: int
    times: Mapping[str, Times]
    """"ours", and whoever was measured beside: torch, gather, dense."""

    gb_s: float
    gflop_s: float
    bandwidth_share: float
    """Of the memory's measured rate."""

    product_share: float | None
    """Of the measured rate of products at as many rows as share a weight here; None: no product."""

    floor_s: float
    """The larger of the times that the bytes and the operations take at these rates."""

    reached: float
    """floor_s over the median."""

    @classmethod
    def of(cls, case: Case, times: Mapping[str, Times], ceilings: Ceilings) -> Self:
        work, seconds = case.work, times["ours"].median_s
        rate = _flop_s(case, times, ceilings)
        byte_floor_s = work.num_bytes / (1e9 * ceilings.memory_read_gb_s)
        floor_s = byte_floor_s if rate is None else max(byte_floor_s, work.flops / rate)
        return cls(
            kernel=case.kernel,
            shape=case.shape,
            num_bytes=work.num_bytes,
            flops=work.flops,
            times=times,
            gb_s=work.num_bytes / seconds / 1e9,
            gflop_s=work.flops / seconds / 1e9,
            bandwidth_share=byte_floor_s / seconds,
            product_share=None if rate is None else work.flops / seconds / rate,
            floor_s=floor_s,
            reached=floor_s / seconds,
        )

    def times_faster(self, arm: str) -> float | None:
        """The median of an arm over ours; None where it was not measured."""
        return self.times[arm].median_s / self.times["ours"].median_s if arm in self.times else None


def _flop_s(case: Case, times: Mapping[str, Times], ceilings: Ceilings) -> float | None:
    """Operations a second that bound this case."""
    if case.rate_of is not None:
        return case.work.flops / times[case.rate_of].median_s
    return None if case.work.product_rows is None else 1e9 * ceilings.gemm_at(case.work.product_rows)


@dataclass(frozen=True, kw_only=True)
class KernelsResult:
    """One measurement of one commit on one machine."""

    rows: tuple[KernelFigures, ...]
    ceilings: Ceilings
    backend: str
    isa: str
    """Instruction set of the native kernels; empty where another backend is "ours"."""

    working_set_bytes: int
    last_level_cache_bytes: int
    threads: int
    config: KernelsConfig
    command: str
    commit: str
    dirty: bool
    started: str
    """UTC, ISO 8601."""

    machine: Machine
    load: ForeignLoad
    """Of others, during the runs."""

    forced: bool
    """The machine was busy, and --force measured all the same."""

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"bench": "kernels", **rounded(asdict(self))}
        return row
