"""The two orders to compare with: by hand, and on the engine."""

from pathlib import Path

from manylora.bench.serve.policies import EarlyAbort, LastInFirstOut
from manylora.errors import OverloadedError
from manylora.lora.library import Library
from manylora.lora.mixture import BASE
from manylora.memory.block_table import BlockTable
from manylora.models.tiny import tiny_model
from manylora.text import Engine, EngineConfig
from manylora.text.params import SamplingParams
from manylora.text.policy import EngineView, FirstComeFirstServed, Policy
from manylora.text.scheduler import Scheduled
from manylora.text.sequence import Request, Sequence


def sequence(arrival: int, *, deadline: float | None = None, has_begun: bool = False) -> Sequence:
    request = Request(str(arrival), arrival, (1,), SamplingParams(), 9, BASE, deadline=deadline)
    return Sequence(request, 0, [1], BlockTable(4), num_cached=0 if has_begun else None)


def early_abort(max_num_seqs: int = 8) -> EarlyAbort:
    policy = EarlyAbort()
    policy.begin(EngineView(max_batch_tokens=64, max_num_seqs=max_num_seqs, load_s=lambda request: 0.0))
    return policy


def step(policy: Policy, waiting: list[Sequence], now: float = 0.0) -> list[int]:
    """A step's order, by who is not refused."""
    refused = {one for one, _ in policy.refuse(waiting, [], now)}
    return arrivals(policy, [one for one in waiting if one not in refused])


def arrivals(policy: Policy, waiting: list[Sequence]) -> list[int]:
    return [one.request.arrival for one in policy.order(waiting, [])]


def test_the_newest_goes_first():
    waiting = [sequence(1), sequence(2), sequence(3)]
    assert arrivals(FirstComeFirstServed(), waiting) == [1, 2, 3]
    assert arrivals(LastInFirstOut(), waiting) == [3, 2, 1]


def test_early_abort_refuses_what_is_half_a_second_from_its_deadline():
    waiting = [
        sequence(1, deadline=6.0),
        sequence(2, deadline=6.1),
        sequence(3),
        sequence(4, deadline=1.0, has_begun=True),
    ]
    refused = list(early_abort().refuse(waiting, [], now=5.5))
    assert [one.request.arrival for one, _ in refused] == [1]
    error = refused[0][1]
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s > 0
    assert len(list(early_abort().refuse(waiting, [], now=5.6))) == 2
    running = [sequence(number) for number in range(5, 8)]
    assert len(list(early_abort(4).refuse(waiting, running, now=5.6))) == 2
    assert list(early_abort(3).refuse(waiting, running, now=5.6)) == [], "every place is taken"


def test_early_abort_turns_to_the_newest_while_more_come_than_are_admitted():
    policy = early_abort()
    crowd = [sequence(number) for number in range(10)]
    assert step(policy, crowd) == list(range(9, -1, -1))
    policy.stepped([Scheduled(one, 1) for one in crowd], 0.1)  # all ten at a time
    assert step(policy, [sequence(10), sequence(11)]) == [10, 11]
    assert step(policy, [sequence(number) for number in range(12, 40)]) == list(range(39, 11, -1))


def test_who_is_dropped_has_come_all_the_same():
    policy = early_abort()
    crowd = [sequence(number) for number in range(4)]
    assert step(policy, crowd) == [3, 2, 1, 0]
    policy.stepped([Scheduled(one, 1) for one in crowd], 0.1)
    waiting = [*(sequence(number, deadline=1.0) for number in range(4, 16)), sequence(16), sequence(17)]
    assert step(policy, waiting, now=0.9) == [17, 16], "14 came, though two are left"


def ends(policy: Policy, tmp_path: Path, deadlines: list[float | None]) -> list[tuple[int, str]]:
    """(number, how it ended) of requests that come together to an engine that runs one at a time, as they end."""
    config = EngineConfig(pool_bytes=1 << 20, max_num_seqs=1, max_batch_tokens=16)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    ended = []
    with Engine(tiny_model(), None, Library(tmp_path), config, policy) as engine:
        for number, deadline_s in enumerate(deadlines):
            engine.submit([1, 2, 3], params, request_id=str(number), deadline_s=deadline_s)
        while engine.has_work():
            for output in engine.step():
                if output.event is not None:
                    error = output.event.error
                    ended.append((int(output.request_id), type(error).__name__ if error else "finished"))
    return ended


def test_on_the_engine(tmp_path):
    deadlines = [60.0, 0.4, None, 60.0]
    in_turn = [(number, "finished") for number in range(4)]
    assert ends(FirstComeFirstServed(), tmp_path, deadlines) == in_turn
    assert ends(LastInFirstOut(), tmp_path, deadlines) == in_turn[::-1]
    assert ends(EarlyAbort(), tmp_path, deadlines)[0] == (1, "OverloadedError")
    assert sorted(ends(EarlyAbort(), tmp_path, deadlines)[1:]) == [(n, "finished") for n in (0, 2, 3)]
