"""What is measured: a system that holds one model and its adapters, and runs traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from manylora.bench.text.timeline import RunFigures
from manylora.bench.text.workload import Trace, TraceRequest

ADAPTER_GGUF = "adapter.gguf"
"""In the directory of an adapter, the same for llama.cpp, where it takes part."""


def adapter_name(number: int) -> str:
    """The name of adapter `number` in the library and the name of its folder; PEFT accepts it too."""
    return f"adapter-{number:05d}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every contender is given: the same weights, the same adapters, the same requests."""

    model: str
    dtype: str
    threads: int
    adapters_folder: str
    """PEFT directories, named by `adapter_name`."""

    max_batch: int
    """Most requests that our engine runs at a time. A peer's batch comes with each run."""

    pool_bytes: int
    resident: bool
    """Load our adapters before the clock starts, as the peers always do."""

    trace: Trace
    kv_cache_dtype: str = "auto"
    """Our engine's, as the next."""

    adapter_dtype: str = "auto"

    def adapter_folder(self, number: int) -> Path:
        return Path(self.adapters_folder, adapter_name(number))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        requests = tuple(
            TraceRequest(
                prompt=tuple(request["prompt"]),
                mixture=tuple((adapter, weight) for adapter, weight in request["mixture"]),
            )
            for request in values["trace"]["requests"]
        )
        return cls(**{**values, "trace": Trace(requests, values["trace"]["output_tokens"])})


@dataclass(frozen=True, kw_only=True)
class RunOrder:
    """One run: the job's trace or a part of it."""

    base_only: bool = False
    batch: int = 128
    """Requests that a peer generates for at a time."""

    max_requests: int | None = None
    max_output_tokens: int | None = None

    listen: bool = False
    """Note each forward pass instead of measuring throughput; our own engine alone can."""

    def cut(self, trace: Trace) -> Trace:
        trace = trace.on_base() if self.base_only else trace
        return trace.cut(max_requests=self.max_requests, max_output_tokens=self.max_output_tokens)


class Contender(Protocol):
    """Made once (loading is not timed), run many times."""

    def run(self, order: RunOrder) -> RunFigures: ...
