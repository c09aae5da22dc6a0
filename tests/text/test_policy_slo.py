"""First tokens by their deadlines: what is planned, set aside and refused, and what share is in time under load."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from manylora.bench.serve.policies import EarlyAbort, LastInFirstOut
from manylora.errors import ConfigError, OverloadedError
from manylora.lora.mixture import BASE
from manylora.memory.block_table import BlockTable
from manylora.text.pace import Pace
from manylora.text.params import SamplingParams
from manylora.text.policies import make_policy
from manylora.text.policy import EngineView, FirstComeFirstServed, Policy
from manylora.text.policy_slo import PLANNED_EACH_STEP, FirstTokenDeadline
from manylora.text.scheduler import Scheduled
from manylora.text.sequence import Request, Sequence
from tests.text.simulation import SLO_S, Job, Outcome, Simulation, attainment, gamma_trace

# -- by itself: 0.01 s a token, nothing fixed, so that all times can be told


def sequence(
    arrival: int,
    num_prompt: int,
    num_output: int,
    *,
    at: float = 0.0,
    within: float | None = 6.0,
    n: int = 1,
) -> Sequence:
    request = Request(
        str(arrival),
        arrival,
        (0,) * num_prompt,
        SamplingParams(n=n),
        num_output,
        BASE,
        submitted_at=at,
        deadline=None if within is None else at + within,
    )
    return Sequence(request, 0, list(request.prompt), BlockTable(16))


def policy(
    load_s: Callable[[Request], float] = lambda request: 0.0, **options: float
) -> FirstTokenDeadline:
    made = FirstTokenDeadline(**options)
    made.begin(EngineView(max_batch_tokens=100, max_num_seqs=8, load_s=load_s))
    for num_tokens in (50, 100):
        made.stepped([Scheduled(sequence(-1, num_tokens, 1), num_tokens)], 0.01 * num_tokens)
    return made


def refused(
    by: Policy, waiting: list[Sequence], now: float, running: Iterable[Sequence] = ()
) -> dict[int, OverloadedError]:
    result = {}
    for one, error in by.refuse(waiting, list(running), now):
        assert isinstance(error, OverloadedError)
        result[one.request.arrival] = error
    return result


def order(by: Policy, waiting: list[Sequence], now: float = 0.0) -> list[int]:
    assert refused(by, waiting, now) == {}
    return [one.request.arrival for one in by.order(waiting, [])]


def test_those_that_can_all_make_it_go_by_deadline() -> None:
    waiting = [
        sequence(0, 50, 50, within=5),
        sequence(1, 200, 100, within=6),
        sequence(2, 10, 10, within=4),
    ]
    assert order(policy(), waiting) == [2, 0, 1]


def test_when_not_all_can_the_longest_are_set_aside_and_served_last_the_shortest_first() -> None:
    # 2 s each of the short ones, 4 s and 5 s: in 6 s, less a margin, three short ones begin or one of the others.
    waiting = [
        sequence(0, 100, 400),
        sequence(1, 100, 300),
        *(sequence(number, 100, 100) for number in (2, 3, 4)),
    ]
    assert order(policy(), waiting) == [2, 3, 4, 1, 0]


def test_a_request_is_refused_when_it_would_be_late_even_if_it_were_next() -> None:
    short, long = sequence(0, 100, 10), sequence(1, 400, 10)
    by = policy()
    assert refused(by, [short, long], 1.9) == {}
    assert refused(by, [short, long], 2.1).keys() == {1}
    assert refused(by, [short, long], 5.1).keys() == {0, 1}
    for num_output, retry_s in {1000: 10.1, 10: 1.0, 10_000: 60.0}.items():
        error = refused(by, [short, long, sequence(2, 10, num_output, at=5)], 5.1)[1]
        assert "9.1 s after the request, beyond its deadline of 6 s" in str(error)
        assert error.retry_after_s == pytest.approx(retry_s)


def test_prompts_ahead_of_it_and_adapters_to_load_count() -> None:
    late = sequence(0, 100, 10, at=0.0)
    running = [sequence(1, 301, 10)]
    assert refused(policy(), [late], 1.5) == {}
    assert refused(policy(), [late], 2.1, running).keys() == {0}
    assert refused(policy(lambda request: 4.9), [late], 1.5) == {}
    assert refused(policy(lambda request: 5.1), [late], 1.5).keys() == {0}


def test_who_has_begun_is_neither_set_aside_nor_refused() -> None:
    first, second = sequence(0, 300, 400, n=2), sequence(1, 10, 10, at=5.0)
    sibling = Sequence(first.request, 1, list(first.request.prompt), BlockTable(16))
    by = policy()
    assert refused(by, [first, sibling], 5.9).keys() == {0}
    by.stepped([Scheduled(first, 300)], 3.0)
    assert order(by, [first, sibling, second], 5.9)[:2] == [0, 0]


def test_without_a_deadline_nobody_is_refused_and_everybody_has_a_turn() -> None:
    patient = sequence(0, 300, 4000, within=None)
    by = policy(patience_s=60.0)
    others = [sequence(number, 10, 10, at=30.0) for number in (1, 2)]
    assert order(by, [patient, *others], 30.0) == [1, 2, 0]
    others = [sequence(number, 10, 10, at=58.0) for number in (1, 2)]
    assert order(by, [patient, *others], 58.0)[0] == 0
    assert refused(by, [patient], 1e6) == {}


def test_what_loads_take_is_asked_once_of_each_request_however_many_steps_it_waits() -> None:
    asked: list[int] = []
    by = policy(lambda request: asked.append(request.arrival) or 0.5)  # type: ignore[func-returns-value]
    waiting = [sequence(number, 10, 10) for number in range(3)]
    for now in (0.0, 0.1, 0.2):
        assert order(by, waiting, now) == [0, 1, 2]
    assert asked == [0, 1, 2]
    assert order(by, waiting[1:], 0.3) == [1, 2]
    assert len(by._entries) == 2, "who has left must not be remembered"


def test_where_many_wait_a_plan_stands_for_several_steps() -> None:
    by = policy()
    crowd = [
        sequence(number, 1, 1, at=number / 1000, within=60) for number in range(2 * PLANNED_EACH_STEP + 1)
    ]
    assert order(by, crowd)[:3] == [0, 1, 2]
    late, urgent, preempted = (
        sequence(1000, 1, 1, within=1),
        sequence(1001, 1, 1, within=9),
        sequence(1002, 1, 1),
    )
    preempted.num_cached = 0
    for _ in range(2):
        arrivals = order(by, [*crowd[1:], late, urgent, preempted], 2.0)
        assert [arrivals[0], arrivals[1], *arrivals[-2:]] == [1002, 1, 1000, 1001], (
            "0 runs; the newest go last"
        )
    assert refused(by, [*crowd[1:], late, urgent, preempted], 2.0).keys() == {1000}
    assert [one.request.arrival for one in by.order([*crowd[1:], urgent], [])][:2] == [1001, 1]


def test_before_any_step_was_seen_nobody_is_refused_too_early() -> None:
    by = FirstTokenDeadline()
    by.begin(EngineView(100, 8, lambda request: 0.0))
    waiting = [sequence(0, 500, 500), sequence(1, 5, 5, within=5.0)]
    assert refused(by, waiting, 4.9) == {}
    assert order(by, waiting, 1.0) == [1, 0]


@pytest.mark.parametrize("options", [{"margin": 1.0}, {"margin": -0.1}, {"patience_s": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_policy("slo", **options)


# -- what it learns from


def test_the_pace_is_the_line_through_the_steps() -> None:
    pace = Pace()
    assert pace.step_s(100) == pace.token_s == 0.0
    rng = np.random.default_rng(0)
    for num_tokens in rng.integers(1, 200, 50):
        pace.add(int(num_tokens), 0.04 + 0.002 * num_tokens)
    assert pace.step_s(1) == pytest.approx(0.042)
    assert pace.step_s(500) == pytest.approx(1.04)
    for num_tokens in rng.integers(1, 200, 200):
        pace.add(int(num_tokens), 0.08 + 0.004 * num_tokens)
    assert pace.step_s(500) == pytest.approx(2.08, rel=0.01), "it clings to what was"


def test_steps_of_one_size_and_disturbed_ones_give_no_absurd_pace() -> None:
    pace = Pace()
    for _ in range(20):
        pace.add(10, 0.1)
    assert pace.step_s(10) == pace.step_s(1000) == pytest.approx(0.1)
    assert pace.token_s == pytest.approx(0.01)
    for num_tokens, seconds in [(1, 5.0), (100, 0.01), (1, 3.0), (200, 0.01)]:
        pace.add(num_tokens, seconds)
    assert 0 <= pace.step_s(1000) < 5
    assert pace.step_s(0) >= 0


# -- in service


CAPACITY = 1.3
"""Requests a second that the simulated engine serves when many wait: measured in the first test below."""


def serve(policy: Policy, load: float, seed: int, cv: float) -> list[Outcome]:
    return Simulation(policy).run(gamma_trace(rate=load * CAPACITY, duration_s=60, seed=seed, cv=cv))


def test_the_simulated_capacity_is_what_it_is_taken_for() -> None:
    jobs = gamma_trace(rate=2, duration_s=100, seed=0)
    simulation = Simulation(FirstComeFirstServed())
    ends = simulation.run(
        [Job(0.0, job.num_prompt, job.num_output, job.adapter) for job in jobs], deadline_s=None
    )
    assert all(outcome.ended for outcome in ends)
    assert len(jobs) / simulation.now == pytest.approx(CAPACITY, rel=0.1)


@pytest.mark.parametrize("cv", [1.0, 4.0])
@pytest.mark.parametrize("load", [1.0, 2.0])
def test_attainment_is_at_least_that_of_lifo_and_of_early_abort(load: float, cv: float) -> None:
    gains = []
    for seed in range(5):
        own = attainment(serve(FirstTokenDeadline(), load, seed, cv))
        lifo, abort = (
            attainment(serve(other, load, seed, cv)) for other in (LastInFirstOut(), EarlyAbort())
        )
        assert own >= max(lifo, abort), f"seed {seed}: {own:.3f}, LIFO {lifo:.3f}, early abort {abort:.3f}"
        gains.append(own - max(lifo, abort))
    if load > 1:
        assert np.mean(gains) > 0.03, "at twice the capacity a better choice of victims must show"


def test_who_is_refused_is_refused_before_the_deadline_and_who_is_served_is_in_time() -> None:
    outcomes = serve(FirstTokenDeadline(), 2.0, 0, 1.0)
    refusals = [outcome.refused_s for outcome in outcomes if outcome.refused_s is not None]
    assert len(refusals) > len(outcomes) // 10
    assert max(refusals) < SLO_S + 0.6, "within a step of the deadline at the latest"
    assert min(refusals) < SLO_S - 0.3, "long prompts are told earlier"
    late = [outcome for outcome in outcomes if outcome.ended and not outcome.attains()]
    assert len(late) <= len(outcomes) // 50


def test_with_little_load_nobody_is_refused() -> None:
    outcomes = serve(FirstTokenDeadline(), 0.5, 0, 1.0)
    assert attainment(outcomes) == 1.0
