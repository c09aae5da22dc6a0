"""The scheduler by random life, and each situation that once starved or stopped somebody, by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from functools import partial
from random import Random

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from manylora.bench.serve.policies import EarlyAbort
from manylora.lifecycle import RequestState
from manylora.text.policy import AdapterClustering, FirstComeFirstServed, Policy
from manylora.text.policy_fair import FairShare
from manylora.text.policy_slo import FirstTokenDeadline
from manylora.text.sequence import Sequence
from tests.text.schedules import World, content

SIZES = {"a": 1, "b": 2, "c": 3, "d": 2}
NAMES = [*SIZES, "a'"]


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 1), min_size=1, max_size=8),
        "max_tokens": st.integers(1, 8),
        "mixture": st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 0.5]), max_size=2),
        "tenant": st.sampled_from(["", "x", "y"]),
        "deadline_s": st.sampled_from([None, 3.0, 30.0]),
        "n": st.sampled_from([1, 1, 3]),
    }
)


class LastComeFirstServed(Policy):
    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        return reversed(waiting)


class SchedulerLife(RuleBasedStateMachine):
    """Requests, adapters and steps in any order, in pools that are too small; in the end all must end."""

    @initialize(
        num_pages=st.integers(4, 14),
        page_tokens=st.integers(1, 3),
        max_num_seqs=st.integers(1, 4),
        spare_tokens=st.integers(0, 6),
        prefix_caching=st.booleans(),
        policy=st.sampled_from(
            [
                FirstComeFirstServed,
                LastComeFirstServed,
                partial(AdapterClustering, 1, 2),
                FairShare,
                FirstTokenDeadline,
                EarlyAbort,
            ]
        ),
        crowd=st.lists(REQUESTS, min_size=2, max_size=8),
        seed=st.integers(0, 9),
    )
    def begin(
        self, num_pages, page_tokens, max_num_seqs, spare_tokens, prefix_caching, policy, crowd, seed
    ):
        self.chance = Random(seed)
        self.world = World(
            num_pages,
            SIZES,
            policy=policy(),
            page_tokens=page_tokens,
            max_batch_tokens=max_num_seqs + spare_tokens,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
        )
        self.submit(crowd)

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=3))
    def submit(self, requests):
        for request in requests:
            self.world.submit(**request)

    @rule(num_steps=st.integers(1, 4), token=st.integers(0, 1))
    def step(self, num_steps, token):
        for _ in range(num_steps):
            self.world.step(token=token)

    @rule(num_steps=st.integers(1, 4), token=st.integers(0, 1))
    def deliver_and_step(self, num_steps, token):
        for _ in range(num_steps):
            self.world.deliver()
            self.world.step(token=token)

    @rule(name=st.sampled_from(NAMES))
    def read(self, name):
        self.world.supply.read(name)

    @precondition(lambda self: self.world.supply.images)
    @rule(data=st.data())
    def forget(self, data):
        """The supply may drop what it has read."""
        self.world.supply.images.remove(data.draw(st.sampled_from(sorted(self.world.supply.images))))

    @precondition(lambda self: self.world.supply.copying)
    @rule(data=st.data())
    def finish_copy(self, data):
        self.world.supply.finish_copy(data.draw(st.sampled_from(self.world.supply.copying)))

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def cancel(self, data):
        self.world.cancel(data.draw(st.sampled_from(self.world.live)))

    @precondition(lambda self: self.world.scheduler.running)
    @rule(data=st.data())
    def stop_early(self, data):
        self.world.finish(data.draw(st.sampled_from(self.world.scheduler.running)))

    @rule(name=st.sampled_from(NAMES))
    def pin(self, name):
        self.world.pin(name)

    @precondition(lambda self: self.world.pinned)
    @rule()
    def unpin_all(self):
        self.world.unpin_all()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        self.world.unpin_all()
        self.world.drain(self.chance)
        scheduler, adapters = self.world.scheduler, self.world.memory.adapters
        event(f"preempted: {scheduler.num_preemptions > 0}")
        event(f"evicted adapters: {adapters.stats.evictions > 0}")
        event(f"shared prefixes: {scheduler.num_prefix_tokens > 0}")
        event(f"rejected: {bool(self.world.rejected)}")


TestSchedulerLife = SchedulerLife.TestCase
TestSchedulerLife.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)


def run_until(world: World, is_so: Callable[[], bool], *, delivering: bool = False) -> None:
    for _ in range(50):
        if is_so():
            return
        if delivering:
            world.deliver()
        world.step()
    raise AssertionError("it does not come to that")


def finish(world: World, sequence: Sequence) -> None:
    run_until(world, lambda: sequence not in world.live, delivering=True)


def test_decodes_come_before_prompts_in_the_budget():
    world = World(40, max_batch_tokens=8)
    (first,) = world.submit(6)
    world.step()
    (second,) = world.submit(30)
    assert world.step() == [first, second]
    assert (len(first.output), second.num_computed) == (2, 7)


def test_the_youngest_is_preempted_and_goes_on_where_it_was():
    world = World(6, max_num_seqs=2)
    (old,) = world.submit(4, 6)
    (young,) = world.submit(4, 6)
    run_until(world, lambda: world.scheduler.num_preemptions > 0)
    assert world.scheduler.waiting == [young]
    kept = list(young.tokens)
    assert len(kept) > 4
    finish(world, young)
    assert old not in world.live
    assert young.tokens[: len(kept)] == kept
    assert len(young.output) == 6


def test_what_can_never_fit_is_refused_and_what_just_fits_runs():
    world = World(6, {"x": 2, "y": 2})
    (too_long,) = world.submit(3, 2, "xy")
    (fits,) = world.submit(2, 2, "xy")
    world.drain()
    assert world.rejected == [too_long]
    assert len(fits.output) == 2


def test_requests_whose_adapters_do_not_fit_together_run_one_after_the_other():
    world = World(6, {"x": 4, "y": 4})
    (first,) = world.submit(2, 2, "x")
    (second,) = world.submit(2, 2, "y")
    finish(world, first)
    assert len(second.output) == 0
    finish(world, second)
    assert world.memory.adapters.stats.loads == 2


def test_parts_of_a_mixture_do_not_evict_each_other():
    world = World(6, {"x": 2, "y": 2, "z": 2})
    for name in "xz":
        world.submit(1, 1, name)
    world.drain()
    # x has been idle for longest, and y needs the pages of one of the two.
    (both,) = world.submit(2, 2, "xy")
    finish(world, both)
    assert world.memory.adapters.pages(content("x")) is not None
    assert world.memory.adapters.stats.loads == 3


def test_two_mixtures_do_not_take_from_each_other_what_has_just_been_copied():
    """Neither fits beside the other. Each took the other's adapters before its own were all there: none ever ran."""
    world = World(6, {"x": 2, "y": 2, "z": 3})
    world.submit(2, 2, "xy")
    world.submit(2, 2, "z")
    for num_steps in range(60):
        for name in "xyz":
            world.supply.read(name)
        world.step()
        if world.supply.copying and num_steps % 2:  # one after the other, two steps for each
            world.supply.finish_copy(world.supply.copying[0])
    assert not world.live


def test_a_slow_file_stops_nobody_however_many_wait_for_it():
    world = World(40, {"x": 1}, max_num_seqs=2)
    for _ in range(20):
        world.submit(2, 2, "x")
    (base,) = world.submit(2, 2)
    assert world.step() == [base]


def test_whoever_waits_for_memory_stops_those_behind_it():
    world = World(6)
    (running,) = world.submit(6, 4)
    world.step()
    (large,) = world.submit(10, 1)
    (small,) = world.submit(1, 1)
    run_until(world, lambda: running not in world.live)
    assert len(large.output) == len(small.output) == 0
    assert world.step() == [large]
    assert world.step() == [large, small]


def test_adapters_placed_early_make_way_for_whoever_is_first():
    """They were kept until nothing ran, so the first in line waited for the last of those who ran."""
    world = World(12, {"x": 3}, max_num_seqs=2)
    (long,) = world.submit(2, 10)
    (short,) = world.submit(2, 2)
    world.step()
    (first,) = world.submit(18, 2)
    (second,) = world.submit(2, 2, "x")
    world.deliver()
    world.step()
    assert short not in world.live
    assert second.held, "nothing was placed early"
    world.supply.finish_copy("x")
    assert world.step() == [long, first]
    assert not second.held


@pytest.mark.parametrize(("num_pages", "num_placed"), [(11, 1), (9, 0)])
def test_nothing_is_placed_ahead_where_those_who_run_may_need_the_room(num_pages, num_placed):
    """It was thrown out again by the first of them to grow, and read once more."""
    world = World(num_pages, {"x": 3}, max_num_seqs=1)
    (running,) = world.submit(2, 14)
    world.step()
    (ahead,) = world.submit(2, 2, "x")
    world.supply.read("x")
    while running in world.live:
        world.step()
        assert len(ahead.held) == num_placed or running not in world.live
    world.drain()


def test_a_waiting_sequence_is_not_robbed_by_younger_ones():
    """It came first but its file came late, and those who ran by then took its pages to grow: it began anew."""
    world = World(5, {"x": 2})
    (old,) = world.submit(2, 1, "x")
    (young,) = world.submit(4, 6)
    world.step()
    world.supply.read("x")
    world.step()
    assert old.held
    assert young in world.scheduler.running
    world.supply.finish_copy("x")
    run_until(world, lambda: world.scheduler.num_preemptions > 0)
    assert world.step() == [old]
    world.drain()


def test_a_sequence_alone_waits_for_a_copy_rather_than_compute_all_its_tokens_again():
    world = World(6, {"x": 2, "y": 2})
    (alone,) = world.submit(2, 8)
    world.step()
    for name in "xy":
        world.submit(1, 1, name)
        world.supply.read(name)
    world.step()
    assert world.supply.copying == ["x", "y"]
    run_until(world, lambda: not world.step())
    assert alone in world.scheduler.running
    world.supply.finish_copy("x")
    assert world.step() == [alone]
    assert world.scheduler.num_preemptions == 0


def test_a_cancelled_request_leaves_an_adapter_that_is_still_being_copied_to_the_next():
    world = World(5, {"x": 3})
    (gone,) = world.submit(2, 1, "x")
    world.supply.read("x")
    world.step()
    world.cancel(gone)
    assert world.supply.copying == ["x"]
    (next_one,) = world.submit(2, 1, "x")
    assert world.step() == []
    world.supply.finish_copy("x")
    assert world.step() == [next_one]
    assert world.memory.adapters.stats.loads == 1


def test_a_pinned_adapter_stays_and_those_who_fit_beside_it_run():
    world = World(4, {"x": 2, "y": 2})
    world.submit(1, 1, "x")
    world.drain()
    world.pin("x")
    (beside,) = world.submit(2, 2)
    (larger,) = world.submit(2, 2, "y")
    finish(world, beside)
    assert world.memory.adapters.is_ready(content("x"))
    assert world.rejected == [larger]
    world.unpin_all()
    (larger,) = world.submit(2, 2, "y")
    finish(world, larger)


def test_pages_that_a_preempted_sequence_needs_to_go_on_cannot_be_spared():
    """It was refused when its turn came again, in the middle of its answer."""
    world = World(10, {"x": 2, "y": 2, "z": 3}, page_tokens=1, prefix_caching=False)
    world.submit(1, 1, "y")
    world.drain()
    (older,) = world.submit(2, 5)
    (younger,) = world.submit(1, 5, "y")
    run_until(world, lambda: younger.has_run and younger in world.scheduler.waiting, delivering=True)
    assert world.scheduler.running == [older]
    assert world.scheduler.could_spare(content("x"), 2)
    assert not world.scheduler.could_spare(content("z"), 3)  # 8 of the 7 that would be left
    assert world.scheduler.could_spare(content("y"), 2)
    world.drain()
    assert world.scheduler.could_spare(content("z"), 3)


def test_samples_of_a_prompt_wait_for_the_pages_that_they_share_and_no_longer():
    world = World(40, max_batch_tokens=16, max_num_seqs=4)
    first, *others = world.submit(9, 3, n=4)
    assert world.step() == [first]
    assert world.step() == [first, *others]
    assert world.scheduler.num_prefix_tokens == 3 * 8


def test_samples_with_nothing_to_share_start_together():
    short = World(40, max_num_seqs=3, max_batch_tokens=30, page_tokens=4)
    assert short.submit(4, n=3) == short.step()
    unshared = World(40, max_num_seqs=3, max_batch_tokens=30, prefix_caching=False)
    assert unshared.submit(9, n=3) == unshared.step()


def test_a_prompt_is_shared_as_soon_as_it_has_been_computed_in_whatever_pieces():
    world = World(40, max_batch_tokens=8)
    prompt = list(range(9))
    world.submit(prompt)  # 8 tokens, then 1
    world.step()
    world.step()
    (second,) = world.submit(prompt)
    world.step()
    assert world.scheduler.num_prefix_tokens == 8
    assert second.num_computed == 9


def test_check_integrity_notices_pages_held_for_nobody():
    world = World(4)
    world.memory.alloc(1)
    with pytest.raises(AssertionError, match="no sequence is left"):
        world.scheduler.check_integrity()


def test_what_does_not_fit_beside_pinned_adapters_is_refused_and_not_waited_for() -> None:
    """It waited for ever, and everybody behind it."""
    world = World(10, {"a": 4, "b": 4})
    world.submit(2, mixture="a")
    world.drain()
    world.pin("a")
    (too_long,) = world.submit(8, max_tokens=6)  # 7 of the 6 pages that are left
    (behind,) = world.submit(2, max_tokens=2)
    (on_pinned,) = world.submit(8, max_tokens=4, mixture="a")  # 6 pages and what is pinned anyway
    (other,) = world.submit(6, max_tokens=4, mixture="b")  # 5 pages and 4
    world.drain()
    assert world.rejected == [too_long, other]
    assert {s.lifecycle.state for s in (behind, on_pinned)} == {RequestState.FINISHED}
