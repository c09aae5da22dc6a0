"""The orders of admission, in the scheduler that they are made for."""

from __future__ import annotations

from manylora.text.policy import AdapterClustering
from manylora.text.sequence import Sequence
from tests.text.schedules import World

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


def distinct(sequences: list[Sequence]) -> set[str]:
    return {str(name) for sequence in sequences for name, _ in sequence.request.adapters}


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
            most = max(most, len(distinct(deliver_and_step(world))))
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
