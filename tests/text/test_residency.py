"""What stays in the pool and what leaves it by order; and that a name never answers with what it was."""

from __future__ import annotations

from random import Random

import pytest

from manylora.errors import AdapterError, AdapterFormatError, AdapterNotFoundError, CapacityError
from manylora.lora.adapter import Adapter
from manylora.lora.library import Library
from manylora.lora.reader import AdapterRef
from manylora.models.tiny import tiny_adapter
from manylora.text import Engine, ResidentInfo, SamplingParams
from tests.text.engines import CONFIG, GREEDY, adapters, engine, expect, library

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 6, 7]


Answers = dict[str, tuple[int, ...]]


def step(served: Engine, answers: Answers) -> None:
    for output in served.step():
        assert output.event is None or output.event.error is None
        answers[output.request_id] = answers.get(output.request_id, ()) + output.token_ids


def drain(served: Engine, answers: Answers | None = None) -> Answers:
    answers = {} if answers is None else answers
    while served.has_work():
        step(served, answers)
    return answers


def resident(served: Engine, name: str) -> ResidentInfo | None:
    return next((one for one in served.residency() if name in one.names), None)


def use(served: Engine, *names: str) -> None:
    """Serve a request with each, one after the other."""
    for name in names:
        (completion,) = served.generate([PROMPT], GREEDY, [name])
        assert completion.token_ids == expect(PROMPT, "a" if name == "alias" else name)


def test_the_list_of_residents_says_who_uses_what() -> None:
    source = library()
    source.add("alias", adapters()["a"])
    with engine(source=source) as served:
        assert served.residency() == []
        use(served, "a", "alias")
        served.submit(PROMPT, GREEDY, {"a": 1.0, "b": 0.5})
        served.submit(PROMPT, GREEDY, "alias")
        while served.stats().num_running < 2:
            served.step()
        a, b = resident(served, "a"), resident(served, "b")
        assert a is not None
        assert b is not None
        assert (a.names, a.num_users, a.is_ready, a.is_pinned) == (("a", "alias"), 2, True, False)
        assert (b.names, b.num_users) == (("b",), 1)
        held = served.stats().pool_bytes.adapters
        assert a.num_bytes + b.num_bytes == held > 0
        drain(served)
        assert [one.num_users for one in served.residency()] == [0, 0]


SMALL_POOL = 26
"""Pages in which not all adapters fit together."""


@pytest.mark.parametrize("pinned", [False, True])
def test_a_pinned_adapter_stays_while_others_come_and_go(pinned: bool) -> None:
    with engine(num_pages=SMALL_POOL) as served:
        if pinned:
            done = served.pin("d")
            assert served.has_work()
            drain(served)
            assert done.result(0) is None
            assert resident(served, "d").is_pinned  # type: ignore[union-attr]
        use(served, "d", "a", "e", "c", "b", "a", "e")
        assert served.stats().adapter_evictions > 0
        assert (resident(served, "d") is not None) == pinned
        served.unpin("d")
        use(served, "a", "e", "c", "a", "e")
        assert resident(served, "d") is None


def test_a_pin_holds_what_the_name_was_and_the_second_name_keeps_it() -> None:
    source = library()
    source.add("alias", adapters()["d"])
    with engine(source=source) as served:
        for name in ("d", "alias"):
            served.pin(name)
        drain(served)
        identity = adapters()["d"].identity
        source.point("d", "b")
        served.unpin("d")
        drain(served)
        assert {one.identity: one.is_pinned for one in served.residency()} == {identity: True}
        served.unpin("alias")
        served.unpin("nobody")
        drain(served)
        assert {one.identity: one.is_pinned for one in served.residency()} == {identity: False}


def test_pinning_a_name_anew_after_it_was_pointed_elsewhere_moves_the_pin() -> None:
    source = library()
    with engine(source=source) as served:
        served.pin("d")
        drain(served)
        source.point("d", "b")
        served.pin("d")
        drain(served)
        pinned = [one.identity for one in served.residency() if one.is_pinned]
        assert pinned == [adapters()["b"].identity]


class BrokenLibrary(Library):
    def load(self, name_or_ref: str | AdapterRef, *, checked: bool = True) -> Adapter:
        raise AdapterFormatError("it is broken")


def test_a_pin_that_cannot_hold_says_why() -> None:
    with engine() as served, pytest.raises(AdapterNotFoundError, match="nobody"):
        served.pin("nobody")
    broken = BrokenLibrary()
    broken.add("broken", adapters()["a"])
    with engine(source=broken) as served:
        done = served.pin("broken")
        drain(served)
        assert isinstance(done.exception(0), AdapterError)
        assert not served.has_work()
    source = library()
    source.add("large", tiny_adapter(CONFIG, rank=60, seed=7))
    with engine(source=source, num_pages=SMALL_POOL) as served:
        done = served.pin("large")
        drain(served)
        with pytest.raises(CapacityError, match="cannot be pinned"):
            done.result(0)


def test_a_pin_waits_where_a_running_request_could_not_end_beside_it() -> None:
    """Its pages were taken, and the request that had been admitted waited for them for ever."""
    num_tokens = 4 * (SMALL_POOL - 1) - len(PROMPT)
    with engine(num_pages=SMALL_POOL) as served:
        long = served.submit(
            PROMPT, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True), None
        )
        answers: Answers = {}
        step(served, answers)
        done = served.pin("e")
        while len(answers[long]) < num_tokens:
            assert not done.done()
            step(served, answers)
        drain(served)
        assert done.done()
    assert answers[long][:12] == expect(PROMPT, None)


@pytest.mark.parametrize("order", ["unpin", "unload"])
def test_a_pin_taken_back_before_it_holds_never_does(order: str) -> None:
    num_tokens = 4 * (SMALL_POOL - 1) - len(PROMPT)
    with engine(num_pages=SMALL_POOL) as served:
        served.submit(PROMPT, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True), None)
        served.step()
        pinned = served.pin("e")
        served.step()
        assert not pinned.done()
        getattr(served, order)("e")
        served.step()
        with pytest.raises(AdapterError, match="the pin of 'e' was taken back"):
            pinned.result(0)
        drain(served)
        assert not any(one.is_pinned for one in served.residency())
        again = served.pin("d")
        drain(served)
        assert again.result(0) is None


def test_unloading_drains_and_then_gives_the_bytes_back() -> None:
    source = library()
    with engine(source=source) as served:
        use(served, "b")
        before = served.stats().pool_bytes
        under_way = served.submit(PROMPT, GREEDY, {"a": 1.0, "b": 0.5})
        answers: Answers = {}
        step(served, answers)
        done = served.unload("a")
        with pytest.raises(AdapterNotFoundError):
            served.submit(PROMPT, GREEDY, "a")
        while served.stats().num_running == 0:
            step(served, answers)
        assert not done.done(), "somebody uses it"
        held = served.stats().pool_bytes.adapters
        assert drain(served, answers)[under_way] == expect(PROMPT, {"a": 1.0, "b": 0.5})
        given_back = done.result(0)
        after = served.stats().pool_bytes
        assert held - given_back == before.adapters == after.adapters
        assert after.kv_in_use == 0
        assert resident(served, "a") is None


def test_unloading_while_it_is_read_gives_back_what_is_read_meanwhile() -> None:
    with engine() as served:
        under_way = served.submit(PROMPT, GREEDY, "a")
        done = served.unload("a")
        assert drain(served)[under_way] == expect(PROMPT, "a")
        assert done.result(0) > 0
        assert served.stats().pool_bytes.adapters == 0


def test_unloading_keeps_what_another_name_means_and_takes_the_pin() -> None:
    source = library()
    source.add("alias", adapters()["a"])
    with engine(source=source) as served:
        use(served, "a", "alias")
        served.pin("a")
        drain(served)
        assert served.unload("a").result(0) == 0
        drain(served)
        assert resident(served, "alias") == served.residency()[0]
        assert not served.residency()[0].is_pinned
        done = served.unload("alias")
        drain(served)
        assert done.result(0) > 0
        assert served.residency() == []
        source.add("never used", adapters()["b"])
        assert served.unload("never used").result(0) == 0
        with pytest.raises(AdapterNotFoundError):
            served.unload("a")


def test_evicting_by_content_is_unloading_for_whoever_took_the_names_away() -> None:
    source = library()
    with engine(source=source) as served:
        use(served, "a", "b")
        identity = adapters()["a"].identity
        assert served.evict(identity).result(0) == 0, "the name still means it"
        source.remove("a")
        done = served.evict(identity)
        drain(served)
        assert done.result(0) > 0
        assert [one.names for one in served.residency()] == [("b",)]


@pytest.mark.parametrize(
    "num_times", [1_000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_name_pointed_elsewhere_all_the_time_never_serves_what_it_was(num_times: int) -> None:
    """A prompt of two cached pages, adapters that are evicted and read again, requests under way at each change."""
    contents, chance, prompt = "abcde", Random(0), list(range(9))
    one = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    wanted = {name: expect(prompt, name, 2) for name in contents}
    assert len(set(wanted.values())) == len(contents)
    source = library()
    answers: Answers = {}
    meant: dict[str, str] = {}
    with engine(source=source, num_pages=28, debug=False) as served:
        now, points_at = chance.choice(contents), ""
        for _ in range(num_times):
            # In runs, so that an adapter is idle for long enough to be evicted.
            now = now if chance.random() < 0.8 else chance.choice(contents)
            points_at = chance.choice([now, *contents])
            source.point("name", points_at)
            meant[served.submit(prompt, one, "name")] = points_at
            while served.stats().num_waiting > 12:
                step(served, answers)
        drain(served, answers)
        stats = served.stats()
    assert sum(answers[key] != wanted[name] for key, name in meant.items()) == 0
    assert len(answers) == num_times
    assert stats.prefix_hit_tokens > num_times, "hardly anything was shared"
    assert stats.adapter_evictions > num_times // 100, "hardly anything was read again"
