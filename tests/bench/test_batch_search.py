"""The search is cheap, and still finds the batch that the whole trace would prefer."""

import pytest

from manylora.bench.text.batch_search import best_batch, predicted_tokens_per_s
from manylora.bench.text.contender import RunOrder
from manylora.bench.text.timeline import RunFigures
from manylora.bench.text.workload import Trace, TraceRequest


class ClockedPeer:
    """Costs a fixed time per batch: prefill and decode step, in seconds; of a new request, `load_s` more."""

    def __init__(self, costs: dict[int, tuple[float, float]], load_s: float = 0.0) -> None:
        self.costs = costs
        self.load_s = load_s
        self.num_loaded = 0
        self.orders: list[RunOrder] = []

    def run(self, order: RunOrder) -> RunFigures:
        self.orders.append(order)
        prefill_s, step_s = self.costs[order.batch]
        prefill_s += self.load_s * max(0, order.batch - self.num_loaded)
        self.num_loaded = max(order.batch, self.num_loaded)
        num_tokens = order.max_output_tokens or 64
        wall_s = prefill_s + (num_tokens - 1) * step_s
        return RunFigures(
            wall_s=wall_s,
            tokens_per_s=order.batch * num_tokens / wall_s,
            requests_per_s=order.batch / wall_s,
            ttft_p50_s=prefill_s,
            ttft_p99_s=prefill_s,
            tpot_p50_s=step_s,
            peak_rss_bytes=1,
            outputs=(),
        )


def trace_of(num_requests: int) -> Trace:
    return Trace((TraceRequest((1, 2)),) * num_requests, output_tokens=64)


def search(peer: ClockedPeer, num_requests: int = 128) -> tuple[int, list[str]]:
    told: list[str] = []
    return best_batch("peer", peer, trace=trace_of(num_requests), report=told.append), told


def test_long_answers_decide_and_not_the_few_tokens_that_were_measured():
    # On 5 tokens the batch of 32 is faster (32 * 5 / 3 s against 64 * 5 / 8.2 s), on 64 tokens that of 64.
    peer = ClockedPeer({32: (1.0, 0.5), 64: (5.0, 0.8), 128: (60.0, 3.0)})
    assert peer.run(RunOrder(batch=32, max_output_tokens=5)).tokens_per_s > 53
    assert peer.run(RunOrder(batch=64, max_output_tokens=5)).tokens_per_s < 40
    assert search(peer)[0] == 64


def test_loading_adapters_does_not_decide():
    costs = {32: (1.0, 0.5), 64: (1.0, 0.7), 128: (1.0, 1.0)}
    assert search(ClockedPeer(costs, load_s=1.0))[0] == search(ClockedPeer(costs))[0] == 128


def test_two_waves_of_few_tokens_are_asked_for_each_batch_and_the_second_is_reported():
    peer = ClockedPeer({32: (1.0, 0.1), 64: (1.0, 0.1), 128: (1.0, 0.1)})
    best, told = search(peer)
    assert best == 128
    asked = (32, 32, 64, 64, 128, 128)
    assert peer.orders == [RunOrder(batch=n, max_requests=n, max_output_tokens=5) for n in asked]
    assert [line.split(": ")[1].split(",")[0] for line in told] == [
        "32 requests",
        "64 requests",
        "128 requests",
    ]


def test_a_batch_that_is_clearly_slower_ends_the_search():
    peer = ClockedPeer({32: (1.0, 0.1), 64: (2.0, 0.4), 128: (1.0, 0.01)})
    assert search(peer)[0] == 32
    assert [order.batch for order in peer.orders] == [32, 32, 64, 64]


def test_no_batch_is_larger_than_the_trace():
    peer = ClockedPeer({32: (1.0, 0.1), 40: (1.0, 0.1)})
    assert search(peer, num_requests=40)[0] == 40


def test_the_prediction_of_the_whole_wave_is_the_wave_itself():
    figures = ClockedPeer({32: (1.0, 0.1)}).run(RunOrder(batch=32))
    assert predicted_tokens_per_s(figures, 32, 64) == pytest.approx(figures.tokens_per_s)
