"""Figures by hand: what counts as a miss, what is a throughput, who got his due."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.bench.serve.job import Outcome, Report
from manylora.bench.serve.stats import (
    Latency,
    attainment,
    capacity,
    fairness,
    figures_of,
    jain_index,
    max_min_shares,
    p95_interval,
    share_interval,
)


def outcome(
    planned_s: float,
    ttft_s: float | None,
    *,
    tokens: int = 11,
    tpot_s: float = 0.1,
    status: int = 200,
    error: str | None = None,
    tenant: int = 0,
    adapter: int | None = 0,
) -> Outcome:
    first_s = None if ttft_s is None else planned_s + ttft_s
    last_s = None if first_s is None else first_s + (tokens - 1) * tpot_s
    return Outcome(
        tenant=tenant,
        adapter=adapter,
        prompt_tokens=8,
        asked_tokens=11,
        planned_s=planned_s,
        sent_s=planned_s + 0.002,
        first_s=first_s,
        last_s=last_s,
        num_tokens=tokens if first_s is not None else 0,
        status=status,
        error=error,
    )


def report(*outcomes: Outcome, wall_s: float = 10.0) -> Report:
    return Report(outcomes, wall_s=wall_s, cpu_s=0.5, num_events=100)


def test_misses_are_the_slow_the_refused_the_aborted_and_the_failed():
    figures = figures_of(
        report(
            outcome(0.0, 1.0),
            outcome(0.1, 3.0, adapter=1),
            outcome(0.2, 6.0),  # not within 6 s
            outcome(0.3, None, status=429, error="full"),
            outcome(0.4, None, status=503, error="1.5 s late"),
            outcome(0.5, 0.1, tokens=3, error="the adapter is gone"),  # in time, but broken off
            outcome(0.6, None, status=0, error="no answer"),
            outcome(0.7, None, status=503, error="2 s late"),
        ),
        slo_s=6.0,
    )
    assert (figures.requests, figures.finished) == (8, 3)
    assert (figures.refused_429, figures.refused_503, figures.cut_off, figures.failed) == (1, 2, 0, 2)
    assert figures.attainment == 2 / 8
    assert figures.satisfaction == pytest.approx((1 - 1 / 36 + 1 - 9 / 36) / 8)
    assert figures.requests_per_s == pytest.approx(0.3)
    assert figures.tokens_per_s == pytest.approx(3.3)
    assert figures.ttft.mean_s == pytest.approx((1 + 3 + 6 + 0.1) / 4)
    assert figures.tpot.p50_s == pytest.approx(0.1)
    assert figures.errors["503: N s late"] == 2
    assert len(figures.errors) == 4
    assert figures.generator_us_per_token == pytest.approx(0.5e6 / 36)
    assert figures.generator_cores == pytest.approx(0.05)
    assert figures.late_p99_s == pytest.approx(0.002)
    assert figures.fairness_tenants is None


def test_where_nothing_came_there_is_no_latency():
    figures = figures_of(report(outcome(0.0, None, status=503, error="late")), slo_s=6.0)
    assert figures.ttft == Latency(None, None, None, None)
    assert figures.attainment == figures.tokens_per_s == 0
    assert figures.generator_us_per_token is None
    assert attainment([], 6.0) == 0


def test_capacity_counts_what_came_between_two_times():
    # 11 tokens from second 1 to 2, one every 0.1 s; the second one starts a second later.
    both = [outcome(0.0, 1.0), outcome(1.0, 1.0)]
    assert capacity(both, 1.5, 2.5, mean_output_tokens=5.0) == pytest.approx((5 + 6) / 5)
    assert capacity(both, 0.0, 10.0, mean_output_tokens=11.0) == pytest.approx(0.2)


def test_jains_index_from_all_to_one():
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert jain_index([1.0, 0.5]) == pytest.approx(2.25 / 2.5)


def test_max_min_shares_by_hand():
    assert max_min_shares([10.0, 1.0, 1.0], 6.0) == [4.0, 1.0, 1.0]
    assert max_min_shares([1.0, 1.0], 6.0) == [1.0, 1.0]
    assert max_min_shares([5.0, 5.0, 0.2], 2.2) == pytest.approx([1.0, 1.0, 0.2])


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0.01, 500))
def test_max_min_shares_by_law(demands, total):
    shares = max_min_shares(demands, total)
    assert sum(shares) == pytest.approx(min(total, sum(demands)))
    level = max(shares)
    for share, demand in zip(shares, demands, strict=True):
        assert share <= demand * (1 + 1e-9)
        # Who has less than the most has all that he asked for.
        assert share == pytest.approx(level) or share == pytest.approx(demand)


def test_a_hog_that_is_served_at_others_cost_is_unfair():
    def trace(hog_s: float, other_s: float) -> list[Outcome]:
        """The hog asks ten times as much; each is served after so many seconds."""
        hog = [outcome(0.1 * i, hog_s, tenant=0) for i in range(100)]
        return hog + [outcome(1.0 * i, other_s, tenant=1) for i in range(10)]

    def index(outcomes: list[Outcome]) -> float:
        found = fairness(outcomes, lambda o: o.tenant, until_s=12.0)
        assert found is not None
        return found

    assert index(trace(0.1, 0.1)) > 0.999
    # In time for the end, or not: the small tenant got nothing before it, the hog everything.
    assert index(trace(0.1, 60.0)) == pytest.approx(0.5)
    # The hog got little, the small one all: as it should be.
    assert index(trace(9.0, 0.1)) > 0.97
    assert fairness(trace(60.0, 60.0), lambda o: o.tenant, until_s=12.0) is None


def test_tenants_and_adapters_are_told_apart():
    figures = figures_of(
        report(
            *(outcome(0.5 * i, 0.5, tenant=i % 2, adapter=i % 3) for i in range(12)),
            outcome(30.0, 9.0, tenant=1),
        ),
        slo_s=6.0,
    )
    assert [tenant.requests for tenant in figures.tenants] == [6, 7]
    assert [tenant.attainment for tenant in figures.tenants] == [1.0, 6 / 7]
    assert figures.tenants[1].ttft.p50_s == pytest.approx(0.5)
    # The last request could not be served while the load lasted; that is not held against anybody.
    assert figures.fairness_tenants == pytest.approx(1)
    assert figures.fairness_adapters == pytest.approx(1)


def test_a_share_is_known_to_within_its_interval():
    low, high = share_interval(280, 400)
    assert (low, high) == pytest.approx((0.653, 0.743), abs=1e-3)
    assert share_interval(400, 400)[1] == 1.0
    assert share_interval(400, 400)[0] == pytest.approx(1 - 3.84 / 400, abs=1e-3)
    assert share_interval(0, 50)[0] == 0.0


@pytest.mark.parametrize("n", [73, 400, 2000])
def test_the_interval_of_the_95th_percentile_holds_it_as_often_as_it_says(n):
    rng = np.random.default_rng(0)
    intervals = [p95_interval(rng.random(n).tolist()) for _ in range(100)]
    held = [found is not None and found[0] <= 0.95 <= found[1] for found in intervals]
    assert 0.88 <= np.mean(held) <= 1.0
    assert p95_interval(rng.random(71).tolist()) is None, "all may lie below it"
    assert p95_interval(rng.random(72).tolist()) is not None
