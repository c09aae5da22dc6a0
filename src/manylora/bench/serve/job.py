"""What `manylora bench serve` and its load generator, a process of its own, say to each other. No torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

MISSED = "not finished when the measurement ended"
"""Error of a request that was cut off."""


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """One request of a trace."""

    at_s: float
    """When it arrives, from the start of the trace."""

    adapter: int | None
    """Number of the adapter that it names; None: the base."""

    prompt: tuple[int, ...]
    """Token ids."""

    output_tokens: int
    """Exactly so many are asked for."""

    tenant: int = 0


@dataclass(frozen=True)
class Job:
    """What the generator does."""

    url: str
    """Of the server, without the path."""

    base: str
    """What `model` says of a request that names no adapter."""

    adapters: tuple[str, ...]
    """Adapter number to the name that the server knows it by."""

    keys: tuple[str, ...]
    """API key of each tenant; empty: none is sent."""

    requests: tuple[ServeRequest, ...]

    timeout_s: float
    """A request that has not ended by then has failed."""

    concurrency: int | None = None
    """None: open loop, each request at its time. Otherwise closed loop: so many at a time, for `closed_s`, the
    requests over again where they run out."""

    closed_s: float = 0.0

    drain_s: float | None = None
    """Of the open loop: so long after the last arrival, requests without a token are cut off. None: none is."""


@dataclass
class Outcome:
    """What became of a request. Times are seconds from the start of the run."""

    tenant: int
    adapter: int | None
    prompt_tokens: int
    asked_tokens: int
    """Of output."""

    planned_s: float
    """When it was to be sent; latencies count from here, so that a late generator flatters nobody."""

    sent_s: float
    first_s: float | None = None
    """The first event with a token; None: there was none."""

    last_s: float | None = None
    num_tokens: int = 0
    status: int = 0
    """Of HTTP; 0: no answer."""

    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.status == 200 and self.error is None

    @property
    def ttft_s(self) -> float | None:
        """First-token latency."""
        return None if self.first_s is None else self.first_s - self.planned_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is no second."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)

    def tokens_by(self, time_s: float) -> float:
        """Tokens that had come by then, as if they came evenly between the first and the last."""
        if self.first_s is None or self.last_s is None or time_s < self.first_s:
            return 0.0
        if time_s >= self.last_s:
            return float(self.num_tokens)
        return 1.0 + (self.num_tokens - 1) * (time_s - self.first_s) / (self.last_s - self.first_s)


@dataclass(frozen=True)
class Report:
    """What the generator hands back."""

    outcomes: tuple[Outcome, ...]
    """In the order of sending."""

    wall_s: float
    """From the start to the end of the last request."""

    cpu_s: float
    """Processor time that the generator took for it."""

    num_events: int
    """Server-sent events that it read."""

    @cached_property
    def cpu_us_per_token(self) -> float | None:
        """What a token cost the generator, connections and all; None where none came."""
        tokens = sum(outcome.num_tokens for outcome in self.outcomes)
        return 1e6 * self.cpu_s / tokens if tokens else None
