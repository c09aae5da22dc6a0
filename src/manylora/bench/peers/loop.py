"""Runs a trace on a peer that is advanced step by step, as our own engine is. For peers' environments: numpy alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

from manylora.bench.text.timeline import Timeline
from manylora.bench.text.workload import TraceRequest

NumberedRequest = tuple[int, TraceRequest]
"""A request with its place in the trace."""


class StepEngine(Protocol):
    """A peer with continuous batching."""

    def add(self, number: int, request: TraceRequest, output_tokens: int) -> None:
        """Hand in a request, to be answered greedily with exactly `output_tokens` tokens."""
        ...

    def step(self) -> Iterable[tuple[int, Sequence[int]]]:
        """Advance all; return who got which tokens, by the requests' numbers."""
        ...


def answer_all(
    engine: StepEngine,
    requests: Sequence[NumberedRequest],
    *,
    batch: int,
    output_tokens: int,
    timeline: Timeline,
    outputs: list[list[int]],
) -> None:
    """Answer the requests, at most `batch` of them at a time; note tokens and their times by the requests' numbers.

    Raises:
        RuntimeError: the engine answered somebody with more tokens than asked for.
    """
    waiting = deque(requests)
    num_open = 0
    while waiting or num_open:
        while waiting and num_open < batch:
            engine.add(*waiting.popleft(), output_tokens)
            num_open += 1
        for number, tokens in engine.step():
            if not tokens:
                continue
            timeline.note(number, len(tokens))
            outputs[number].extend(tokens)
            if len(outputs[number]) > output_tokens:
                raise RuntimeError(
                    f"request {number} was to get {output_tokens} tokens, got {len(outputs[number])}"
                )
            num_open -= len(outputs[number]) == output_tokens


def by_mixture(requests: Iterable[TraceRequest]) -> Iterator[list[NumberedRequest]]:
    """The requests of each mixture together, as a system that switches adapters serves them."""
    ordered = sorted(enumerate(requests), key=lambda item: item[1].mixture)
    for _, group in groupby(ordered, key=lambda item: item[1].mixture):
        yield list(group)
