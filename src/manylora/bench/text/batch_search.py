"""The batch at which a peer is fastest, found at the price of a few tokens.

A static batch makes its answers in waves of `batch` requests. A wave is its prefill and then decode steps that cost
nearly the same each, so that one wave of few tokens tells how long one of many takes. Only the batch is chosen so; the
figures that are reported come from the whole trace at that batch.
"""

from __future__ import annotations

from collections.abc import Callable

from manylora.bench.text.contender import Contender, RunOrder
from manylora.bench.text.timeline import RunFigures
from manylora.bench.text.workload import Trace

BATCHES = (32, 64, 128)
SEARCH_OUTPUT_TOKENS = 5
"""Of a wave: the prefill's token and four decode steps."""

CLEARLY_SLOWER = 0.9
"""A batch this much slower than the best so far ends the search: what it gains by its size, it loses elsewhere."""


def best_batch(name: str, peer: Contender, *, trace: Trace, report: Callable[[str], None]) -> int:
    """Try the batches from the smallest up, the second wave of each, and return the one that would answer fastest."""
    num_requests = len(trace.requests)
    best, best_rate = 0, 0.0
    for batch in sorted({min(batch, num_requests) for batch in BATCHES}):
        order = RunOrder(batch=batch, max_requests=batch, max_output_tokens=SEARCH_OUTPUT_TOKENS)
        peer.run(order)  # so that the adapters of the wave are loaded, and what is made once is made
        rate = predicted_tokens_per_s(peer.run(order), batch, trace.output_tokens)
        report(
            f"looking for the best batch of {name}: {batch} requests, one wave of "
            f"{min(SEARCH_OUTPUT_TOKENS, trace.output_tokens)} tokens each, {rate:.1f} tokens/s predicted"
        )
        if rate > best_rate:
            best, best_rate = batch, rate
        if rate < CLEARLY_SLOWER * best_rate:
            break
    return best


def predicted_tokens_per_s(wave: RunFigures, batch: int, output_tokens: int) -> float:
    """Output tokens per second of waves like this one whose answers have `output_tokens` tokens."""
    return batch * output_tokens / (wave.ttft_p50_s + (output_tokens - 1) * wave.tpot_p50_s)
