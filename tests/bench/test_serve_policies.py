"""The two orders to compare with: by hand, and on the engine."""

from manylora.bench.serve_policies import EarlyAbort, LastInFirstOut
from manylora.errors import OverloadedError
from manylora.lora.mixture import BASE
from manylora.memory.block_table import BlockTable
from manylora.text.params import SamplingParams
from manylora.text.policy import FirstComeFirstServed, Policy
from manylora.text.sequence import Request, Sequence


def sequence(arrival: int, *, deadline: float | None = None, has_begun: bool = False) -> Sequence:
    request = Request(str(arrival), arrival, (1,), SamplingParams(), 9, BASE, deadline=deadline)
    return Sequence(request, 0, [1, 7] if has_begun else [1], BlockTable(4))


def arrivals(policy: Policy, waiting: list[Sequence], running: list[Sequence]) -> list[int]:
    return [one.request.arrival for one in policy.order(waiting, running)]


def test_the_newest_goes_first_after_what_was_preempted():
    waiting = [sequence(1), sequence(2, has_begun=True), sequence(3), sequence(4)]
    assert arrivals(FirstComeFirstServed(), waiting, []) == [1, 2, 3, 4]
    assert arrivals(LastInFirstOut(), waiting, []) == [2, 4, 3, 1]


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


def test_early_abort_turns_to_the_newest_while_more_arrive_than_are_admitted():
    policy = EarlyAbort()
    line = [sequence(i) for i in range(20)]
    # Four arrive in a step, four are admitted: in order of arrival, once the averages have settled.
    for step in range(4):
        waiting, running = line[4 * step : 4 * step + 4], line[4 * step - 4 : 4 * step] if step else []
        policy.order(waiting, running)
    assert arrivals(policy, line[16:], line[12:16]) == [19, 18, 17, 16]  # as many as before: they keep pace
    assert arrivals(policy, line[17:], line[16:17]) == [17, 18, 19]  # fewer arrive than were admitted
    # A crowd, and nobody is admitted.
    crowd = [sequence(i) for i in range(30, 40)]
    assert arrivals(policy, crowd, []) == list(range(39, 29, -1))
