"""From the times of tokens to the figures of one run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One run of one contender. All requests are there at the start: a wait for a place counts in the first token."""

    wall_s: float
    """From the first request handed in to the last token of the last answer."""

    tokens_per_s: float
    """Output tokens over `wall_s`."""

    requests_per_s: float

    ttft_p50_s: float
    """Time from the start to a request's first token."""

    ttft_p99_s: float

    tpot_p50_s: float
    """Time per output token after a request's first."""

    peak_rss_bytes: int
    """Most memory that the process has held since it started."""

    outputs: tuple[tuple[int, ...], ...]
    """Token ids of each answer."""

    distinct_adapters_per_step: float = 0.0
    """Mean over the steps. The engine's own figure, as all below; a peer leaves them at 0."""

    pool_kv_bytes: int = 0
    """Most bytes of the pool that KV held at one time."""

    pool_adapter_bytes: int = 0
    """Most bytes of the pool that adapters held at one time."""

    adapter_loads: int = 0

    adapter_evictions: int = 0

    passes: tuple[dict[str, Any], ...] = ()
    """Each forward pass as `pass_clock.Pass` has it, of a run that was listened to."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "outputs": tuple(tuple(answer) for answer in values["outputs"])})


class Timeline:
    """Notes when each request got its tokens. The clock runs from the making of the object."""

    def __init__(self, num_requests: int) -> None:
        self._start_s = time.perf_counter()
        self._first_s = np.full(num_requests, np.nan)
        self._last_s = np.full(num_requests, np.nan)
        self._num_tokens = np.zeros(num_requests, dtype=np.int64)

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start_s

    def note(self, request: int, num_tokens: int = 1, *, at_s: float | None = None) -> None:
        """`num_tokens` more tokens of `request` have been made: just now, or at `at_s` seconds from the start."""
        now_s = self.now_s if at_s is None else at_s
        if self._num_tokens[request] == 0:
            self._first_s[request] = now_s
        self._last_s[request] = now_s
        self._num_tokens[request] += num_tokens

    def figures(self, outputs: list[list[int]], **engine: Any) -> RunFigures:
        """The figures of a run that has ended; `engine` is what only the engine knows.

        Requests of a single token have no time per token; where all are such, it is 0.
        """
        assert self._num_tokens.all(), "a request ended without a token"
        wall_s = float(self._last_s.max())
        longer = self._num_tokens > 1
        tpot_s = (self._last_s[longer] - self._first_s[longer]) / (self._num_tokens[longer] - 1)
        return RunFigures(
            wall_s=wall_s,
            tokens_per_s=float(self._num_tokens.sum()) / wall_s,
            requests_per_s=len(self._num_tokens) / wall_s,
            ttft_p50_s=float(np.percentile(self._first_s, 50)),
            ttft_p99_s=float(np.percentile(self._first_s, 99)),
            tpot_p50_s=float(np.percentile(tpot_s, 50)) if longer.any() else 0.0,
            peak_rss_bytes=peak_rss_bytes(),
            outputs=tuple(tuple(answer) for answer in outputs),
            **engine,
        )


def peak_rss_bytes() -> int:
    """The most memory that this process has held.

    Read from /proc: `getrusage` starts a child at the peak of the parent that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status names no VmHWM")
