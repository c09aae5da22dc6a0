"""Equal shares: the counters, and what comes of them when one tenant asks for ten times as much as the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest

from manylora.errors import ConfigError
from manylora.text.policies import make_policy
from manylora.text.policy import FirstComeFirstServed, Policy
from manylora.text.policy_fair import FairShare, VirtualCounters
from manylora.text.sequence import Request
from tests.text.simulation import Job, Outcome, Simulation, TimedSupply, gamma_trace

# -- counters


def test_who_comes_back_has_saved_nothing_up() -> None:
    counters = VirtualCounters()
    counters.wait({"a", "b"})
    counters.charge("a", 100.0)
    counters.charge("b", 60.0)
    counters.wait({"a"})
    counters.charge("a", 50.0)
    counters.wait({"a", "b"})
    assert (counters["a"], counters["b"]) == (150.0, 150.0)


def test_who_has_had_more_still_has_had_more_when_it_comes_back() -> None:
    counters = VirtualCounters()
    counters.wait({"a", "b"})
    counters.charge("a", 100.0)
    counters.wait({"b"})
    counters.charge("b", 10.0)
    counters.wait({"a", "b"})
    assert (counters["a"], counters["b"]) == (100.0, 10.0)


def test_a_newcomer_begins_where_the_others_are_even_if_none_of_them_waits() -> None:
    counters = VirtualCounters()
    for _ in range(3):
        counters.wait({"a"})
        counters.charge("a", 1000.0)
        counters.wait(set())
    counters.wait({"new"})
    assert counters["new"] == 3000.0


def test_whoever_is_owed_nothing_is_forgotten() -> None:
    counters = VirtualCounters()
    for number in range(100):
        counters.wait({"always", f"passing {number}"})
        counters.charge("always", 1.0)
    assert len(counters._served) <= 3


# -- shares of the service


def flood(tenant: str, num_jobs: int, *, adapter: str = "", at: float = 0.0) -> list[Job]:
    return [Job(at, 32, 32, adapter, tenant) for _ in range(num_jobs)]


def served_until(outcomes: list[Outcome], seconds: float, key: str) -> Counter[str]:
    """First tokens within so many seconds, by tenant or adapter."""
    return Counter(
        getattr(outcome.job, key)
        for outcome in outcomes
        if outcome.first_token_s is not None and outcome.job.arrival_s + outcome.first_token_s <= seconds
    )


def serve(policy: Policy, jobs: list[Job]) -> list[Outcome]:
    outcomes = Simulation(policy, max_num_seqs=8, max_batch_tokens=64).run(jobs, deadline_s=None)
    assert all(outcome.ended for outcome in outcomes)
    return outcomes


def test_tenants_with_enough_to_do_are_served_alike() -> None:
    jobs = flood("greedy", 150) + flood("modest", 60, at=0.1)
    unfair = served_until(serve(FirstComeFirstServed(), jobs), 25, "tenant")
    fair = served_until(serve(FairShare(), jobs), 25, "tenant")
    assert unfair["modest"] == 0
    assert fair["modest"] > 20
    assert abs(fair["greedy"] - fair["modest"]) <= 8


def test_and_within_a_tenant_its_mixtures() -> None:
    jobs = flood("one", 150, adapter="popular") + flood("one", 60, adapter="rare", at=0.1)
    unfair = served_until(serve(FirstComeFirstServed(), jobs), 25, "adapter")
    fair = served_until(serve(FairShare(), jobs), 25, "adapter")
    assert unfair["rare"] == 0
    assert fair["rare"] > 20
    assert abs(fair["popular"] - fair["rare"]) <= 8


def test_shares_are_of_tokens_not_of_requests() -> None:
    long = [Job(0.0, 32, 128, "", "long") for _ in range(60)]
    jobs = long + flood("short", 200, at=0.1)
    # Long enough that a single long answer, a twentieth or less of a share, does not decide.
    counts = served_until(serve(FairShare(), jobs), 60, "tenant")
    cost = {"long": 32 + 2 * 128, "short": 32 + 2 * 32}
    shares = {tenant: counts[tenant] * cost[tenant] for tenant in cost}
    assert counts["short"] > 2 * counts["long"] > 0
    assert shares["short"] == pytest.approx(shares["long"], rel=0.2)


def trace(seed: int, *, with_hog: bool) -> list[Job]:
    """Four tenants with 29 % of what the engine can do in all; the hog asks for ten times as much as each of them."""
    each = 0.29 * 1.3 / 4
    jobs = [
        job
        for tenant in range(4)
        for job in gamma_trace(rate=each, duration_s=60, seed=10 * seed + tenant, tenant=f"tenant-{tenant}")
    ]
    return jobs + with_hog * gamma_trace(rate=10 * each, duration_s=60, seed=10 * seed + 9, tenant="hog")


def p95(policy: Policy, seed: int, *, with_hog: bool) -> float:
    """Of the first-token times of all but the hog."""
    simulation = Simulation(policy, max_num_seqs=16, max_batch_tokens=128)
    outcomes = simulation.run(trace(seed, with_hog=with_hog), deadline_s=None)
    return float(np.percentile([o.first_token_s for o in outcomes if o.job.tenant != "hog"], 95))


@pytest.mark.parametrize("seed", range(3))
def test_a_hog_does_not_double_the_first_token_time_of_the_others(seed: int) -> None:
    alone = p95(FairShare(), seed, with_hog=False)
    assert p95(FirstComeFirstServed(), seed, with_hog=True) > 4 * alone, "the hog is no burden"
    assert p95(FairShare(reserved=0.0), seed, with_hog=True) > 2 * alone, "turns alone would do"
    assert p95(FairShare(), seed, with_hog=True) < 2 * alone


def test_nor_does_its_queue_keep_their_adapters_from_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were read for the oldest requests first, which under overload are all the hog's."""
    jobs = [
        job
        for tenant, rate in {"a": 2.3, "b": 2.3, "c": 2.3, "d": 2.3, "hog": 23}.items()
        for job in gamma_trace(
            rate=rate, duration_s=60, seed=ord(tenant[0]), num_adapters=400, lengths=(8, 32), tenant=tenant
        )
    ]
    # A third of the adapters fits the pool.
    few_fit = {"num_pages": 500, "max_pending": 8}
    speed = {"fixed_s": 0.02, "token_s": 0.001, "adapter_s": 0.0005, "read_s": 0.05}

    def p95() -> float:
        outcomes = Simulation(FairShare(), **few_fit, **speed).run(jobs, deadline_s=None)  # type: ignore[arg-type]
        return float(np.percentile([o.first_token_s for o in outcomes if o.job.tenant != "hog"], 95))

    def oldest_first(supply: TimedSupply, requests: SequenceOf[Request]) -> None:
        prefer(supply, sorted(requests, key=lambda request: request.arrival))

    by_turns = p95()
    prefer = TimedSupply.prefer
    monkeypatch.setattr(TimedSupply, "prefer", oldest_first)
    assert by_turns < p95() / 2


def test_who_asks_for_little_on_the_whole_may_have_a_burst() -> None:
    """Places are reserved against the hog: they were refused to whoever had its share of places at the time."""

    class RefusesAnybody(FairShare):
        def stepped(self, computed, seconds):
            super().stepped(computed, seconds)
            self._served_lately.clear()  # so that all have had the same, which is their share

    def last_of_the_burst(policy: Policy) -> float:
        jobs = flood("hog", 200) + [Job(20.0, 32, 32, "", "small") for _ in range(14)]
        outcomes = Simulation(policy, max_num_seqs=16, max_batch_tokens=512).run(jobs, deadline_s=None)
        return max(o.first_token_s or 0.0 for o in outcomes if o.job.tenant == "small")

    assert last_of_the_burst(FairShare(reserved=0.5)) < 5
    assert last_of_the_burst(RefusesAnybody(reserved=0.5)) > 7


def test_a_tenant_alone_has_all_places() -> None:
    jobs = [Job(0.0, 8, 64, "", "alone") for _ in range(16)]
    simulation = Simulation(FairShare(reserved=0.5), max_num_seqs=8)
    most, stepped = 0, simulation.scheduler.stepped

    def watch(scheduled, seconds):
        nonlocal most
        most = max(most, len(scheduled))
        stepped(scheduled, seconds)

    simulation.scheduler.stepped = watch  # type: ignore[method-assign]
    simulation.run(jobs, deadline_s=None)
    assert most == 8


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"input_price": -1.0}, "input_price"),
        ({"output_price": float("nan")}, "output_price"),
        ({"input_price": 0, "output_price": 0}, "both 0"),
        ({"reserved": 1.0}, "reserved"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make_policy("fair", **options)
