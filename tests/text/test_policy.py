"""The orders of admission: what a policy hands out, alone, and what comes of it in a scheduler."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.lora.adapter import AdapterId
from manylora.lora.mixture import BASE
from manylora.memory.block_table import BlockTable
from manylora.text.params import SamplingParams
from manylora.text.policy import AdapterClustering, FirstComeFirstServed, Policy
from manylora.text.sequence import Request, Sequence
from tests.text.schedules import World


def sequence(arrival: int, adapters: str = "") -> Sequence:
    """adapters: one letter for each part of the mixture; "-" is the base."""
    parts = tuple((letter, 1.0) for letter in adapters.strip("-"))
    request = Request(str(arrival), arrival, (1,), SamplingParams(), 1, BASE, parts)
    return Sequence(request, 0, [1], BlockTable(4))


def sequences(words: str, first: int = 0) -> list[Sequence]:
    """One for each word, in order of arrival."""
    return [sequence(i, word) for i, word in enumerate(words.split(), first)]


def keys(of: Collection[Sequence]) -> set[object]:
    return {key for s in of for key, _ in s.request.adapters}


def order(policy: Policy, waiting: list[Sequence], running: list[Sequence]) -> list[int]:
    """Arrivals as the policy hands them out, when each is admitted at once."""
    result = []
    for s in policy.order(waiting, running):
        s.held = [AdapterId(str(key)) for key, _ in s.request.adapters]
        result.append(s.request.arrival)
    return result


def test_first_come_first_served_is_the_order_of_arrival() -> None:
    waiting = sequences("c a b - ab a", first=3)
    assert order(AdapterClustering(1), waiting, sequences("a a a")) != [3, 4, 5, 6, 7, 8]
    assert order(FirstComeFirstServed(), waiting, sequences("a a a")) == [3, 4, 5, 6, 7, 8]


def test_every_part_of_a_mixture_counts() -> None:
    running, waiting = sequences("ab"), sequences("ac cd ba bcd a -", first=1)
    assert order(AdapterClustering(2), waiting, running) == [3, 5, 6]
    assert order(AdapterClustering(3), waiting, running) == [1, 3, 5, 6]


def test_what_adds_nothing_may_run_beside_a_mixture_beyond_the_bound() -> None:
    assert order(AdapterClustering(2), sequences("abc a d - bc"), []) == [0, 1, 3, 4]


def test_the_overdue_go_first_by_arrival_whatever_they_use() -> None:
    waiting = [sequence(0, "c"), sequence(1, "d"), sequence(6, "a"), sequence(8, "e")]
    running = [sequence(4, "b"), sequence(7, "a")]
    assert order(AdapterClustering(2, max_overtaken=7), waiting, running) == [6]
    assert order(AdapterClustering(2, max_overtaken=6), waiting, running) == [0, 6]
    assert order(AdapterClustering(2, max_overtaken=5), waiting, running) == [0, 1, 6]


some_words = st.sets(st.sampled_from("abcdef"), max_size=3).map("".join)


@settings(deadline=None)
@given(
    queue=st.lists(st.tuples(some_words, st.booleans()), min_size=1, max_size=16),
    max_distinct=st.integers(1, 5),
    max_overtaken=st.integers(0, 16),
)
def test_clustering_hands_out_exactly_what_keeps_the_bound(
    queue: list[tuple[str, bool]], max_distinct: int, max_overtaken: int
) -> None:
    waiting = [sequence(i, word) for i, (word, runs) in enumerate(queue) if not runs]
    running = [sequence(i, word) for i, (word, runs) in enumerate(queue) if runs]
    youngest = max((s.request.arrival for s in running), default=-1)
    overdue = [s for s in waiting if youngest - s.request.arrival > max_overtaken]
    want: list[Sequence] = list(overdue)
    for s in waiting:
        live, more = keys(running + want), keys([s])
        if s not in overdue and (not live or more <= live or len(live | more) <= max_distinct):
            want.append(s)
    assert order(AdapterClustering(max_distinct, max_overtaken), waiting, running) == [
        s.request.arrival for s in want
    ]
    if waiting and not running:
        assert want[0] is waiting[0]


SIZES = dict.fromkeys("vwxyz", 1)


def clustered(max_distinct: int, max_overtaken: int = 64) -> World:
    return World(
        60,
        SIZES,
        policy=AdapterClustering(max_distinct, max_overtaken),
        max_batch_tokens=16,
        max_num_seqs=8,
    )


def deliver_and_step(world: World) -> list[Sequence]:
    world.deliver()
    return world.step()


def ready(world: World, names: str) -> None:
    """Make these adapters resident, without any request."""
    for name in names:
        world.supply.read(name)
        world.supply.place(world.supply.lookup(name)[0], world.memory.alloc(SIZES[name]))  # type: ignore[index]
        world.supply.finish_copy(name)


def test_first_come_first_served_starts_in_the_order_of_arrival():
    world = World(60, max_batch_tokens=16, max_num_seqs=2)
    sequences = [world.submit(2, 2)[0] for _ in range(5)]
    started: list[Sequence] = []
    while world.live:
        started += [sequence for sequence in world.step() if sequence not in started]
    assert started == sequences


def test_at_most_so_many_distinct_adapters_run_at_a_time():
    for max_distinct in (1, 2, 3):
        world = clustered(max_distinct)
        for name in "vwxyzvwxyz":
            world.submit(2, 3, name)
        most = 0
        while world.live:
            most = max(most, len(keys(deliver_and_step(world))))
        assert most == max_distinct


def test_what_uses_a_running_adapter_overtakes_what_does_not():
    world = clustered(1)
    ready(world, "xy")
    (first,) = world.submit(2, 6, "x")
    (other,) = world.submit(2, 2, "y")
    (same,) = world.submit(2, 2, "x")
    (base,) = world.submit(2, 2)
    assert world.step() == [first, same, base]
    assert other in world.scheduler.waiting


def test_an_adapter_that_is_still_being_read_keeps_nobody_out():
    """The slow one took the only place although it could not run, and nothing ran."""
    world = clustered(1)
    ready(world, "y")
    (slow,) = world.submit(2, 2, "x")
    (quick,) = world.submit(2, 2, "y")
    assert world.step() == [quick]
    world.drain()
    assert len(slow.output) == 2


def test_a_mixture_of_more_adapters_than_the_bound_runs_by_itself():
    world = clustered(1)
    ready(world, "xyz")
    (running,) = world.submit(2, 2, "z")
    world.step()
    (mixed,) = world.submit(2, 2, "xy")
    assert world.step() == [running]
    assert world.step() == [mixed]


def overtakers(max_overtaken: int, limit: int = 60) -> int:
    """How many later requests for a running adapter start before an earlier one for another adapter."""
    world = clustered(1, max_overtaken)
    ready(world, "xy")
    world.submit(2, 3, "x")
    world.step()
    (other,) = world.submit(2, 2, "y")
    for num_overtakers in range(limit):
        world.submit(2, 3, "x")
        world.step()
        if other in world.scheduler.running or other not in world.live:
            return num_overtakers
    return limit


def test_nobody_is_overtaken_for_ever():
    assert overtakers(10**9) == 60, "it is never overtaken, so the bound proves nothing"
    assert 5 <= overtakers(5) <= 8
    assert 20 <= overtakers(20) <= 23
