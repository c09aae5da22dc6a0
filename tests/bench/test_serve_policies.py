"""The two orders to compare with: by hand, and on the engine."""

from pathlib import Path

from manylora.bench.serve_policies import EarlyAbort, LastInFirstOut
from manylora.errors import OverloadedError
from manylora.lora.library import Library
from manylora.lora.mixture import BASE
from manylora.memory.block_table import BlockTable
from manylora.models.tiny import tiny_model
from manylora.text import Engine, EngineConfig
from manylora.text.params import SamplingParams
from manylora.text.policy import FirstComeFirstServed, Policy
from manylora.text.scheduler import Scheduled
from manylora.text.sequence import Request, Sequence


def sequence(arrival: int, *, deadline: float | None = None, has_begun: bool = False) -> Sequence:
    request = Request(str(arrival), arrival, (1,), SamplingParams(), 9, BASE, deadline=deadline)
    return Sequence(request, 0, [1], BlockTable(4), num_cached=0 if has_begun else None)


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
    refused = list(EarlyAbort().refuse(waiting, [], now=5.5))
    assert [one.request.arrival for one, _ in refused] == [1]
    error = refused[0][1]
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s > 0
    assert len(list(EarlyAbort().refuse(waiting, [], now=5.6))) == 2


def test_early_abort_turns_to_the_newest_while_more_come_than_are_admitted():
    policy = EarlyAbort()
    crowd = [sequence(number) for number in range(10)]
    assert arrivals(policy, crowd) == list(range(9, -1, -1))
    policy.stepped([Scheduled(one, 1) for one in crowd], 0.1)  # all ten at a time
    assert arrivals(policy, [sequence(10), sequence(11)]) == [10, 11]
    assert arrivals(policy, [sequence(number) for number in range(12, 40)]) == list(range(39, 11, -1))


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
