"""What brings adapters to the pool: who is read, when, how often, and what becomes of failures."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import torch

from manylora.errors import AdapterError, AdapterFormatError, AdapterMismatchError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.library import Library
from manylora.lora.mixture import BASE
from manylora.lora.reader import AdapterRef
from manylora.memory.adapter_cache import AdapterCache
from manylora.memory.pages import PagePool
from manylora.models.adapter_pages import AdapterPages
from manylora.text.loader import AdapterLoader
from manylora.text.params import SamplingParams
from manylora.text.sequence import Request

SITE = "site"
PAGE_BYTES = 256


def adapter(seed: int) -> Adapter:
    """One page of content of its own."""
    generator = torch.Generator().manual_seed(seed)
    lora_a, lora_b = torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)
    return Adapter({SITE: LoraPair(lora_a, lora_b, 1.0)})


class WatchedLibrary(Library):
    """Counts what is read. Names in `held_up` wait until they are let through; names in `broken` cannot be read."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for seed, name in enumerate(names):
            self.add(name, adapter(seed))
        self.loads: Counter[str] = Counter()
        self.held_up: dict[str, threading.Event] = {}
        self.broken: set[str] = set()
        self.on_load: Callable[[AdapterRef], None] = lambda ref: None

    def identity(self, ref: AdapterRef) -> None:
        """Adapters in memory are known at once; here they are known when they have been read, as files are."""
        return super().identity(ref) if self.loads[ref.name] else None  # type: ignore[return-value]

    def load(self, name_or_ref: str | AdapterRef, *, checked: bool = True) -> Adapter:
        assert isinstance(name_or_ref, AdapterRef)
        name = name_or_ref.name
        self.on_load(name_or_ref)
        if name in self.held_up:
            assert self.held_up[name].wait(30)
        if name in self.broken:
            raise AdapterFormatError(f"adapter '{name}' is broken")
        loaded = super().load(name_or_ref, checked=checked)
        self.loads[name] += 1
        return loaded


class Bench:
    """A loader with its pool, in the place of the engine."""

    def __init__(self, names: str, *, num_pages: int = 8, max_pending: int = 4) -> None:
        self.library = WatchedLibrary(names)
        self.pool = PagePool(num_pages)
        ticks = iter(range(10**9))
        self.cache = AdapterCache(self.pool, ticks.__next__)
        self.storage = torch.zeros(num_pages, PAGE_BYTES, dtype=torch.uint8)
        self.mismatched: set[str] = set()
        self.loader = AdapterLoader(
            self.library,
            AdapterPages(self.storage, [(SITE,)]),
            self.cache,
            self.check_fits,
            max_pending=max_pending,
            num_threads=2,
        )
        self.num_requests = 0

    def check_fits(self, loaded: Adapter) -> None:
        if loaded.identity in self.mismatched:
            raise AdapterMismatchError("it is for another model")

    def ref(self, name: str) -> AdapterRef:
        return self.library.locate(name)

    def adapter(self, name: str) -> Adapter:
        found = self.ref(name).adapter
        assert found is not None
        return found

    def open_gates(self) -> None:
        for gate in self.library.held_up.values():
            gate.set()

    def demand(self, names: str) -> Request:
        request = self.request(names)
        self.loader.demand(request)
        return request

    def request(self, names: str) -> Request:
        request = Request(
            request_id=f"request-{self.num_requests}",
            arrival=self.num_requests,
            prompt=(1,),
            params=SamplingParams(),
            max_tokens=1,
            mixture=BASE,
            adapters=tuple((self.ref(name), 1.0) for name in names),
        )
        self.num_requests += 1
        return request

    def settle(self) -> dict[str, Exception]:
        """Poll until nothing is on its way any more but what is held up; returns all failures."""
        failures: dict[str, Exception] = {}
        for _ in range(200):
            before = self.state()
            failures |= {key.name: error for key, error in self.loader.poll().items()}  # type: ignore[attr-defined]
            on_its_way = [
                future
                for key, future in self.loader._reading.items()
                if key.name not in self.library.held_up  # type: ignore[attr-defined]
            ]
            if not on_its_way and not self.loader._copying and self.state() == before:
                return failures
            self.loader.wait(0.01)
        raise AssertionError("it does not settle")

    def state(self) -> tuple[int, int, int]:
        return len(self.loader._reading), len(self.loader._images), len(self.loader.resident)

    def place(self, name: str) -> None:
        """Give an adapter that has been read pages, and wait until it is ready."""
        found = self.loader.lookup(self.ref(name))
        assert found is not None, f"{name} has not been read"
        identity, num_pages = found
        if self.cache.pages(identity) is None:
            while self.pool.num_free < num_pages:
                self.cache.evict_oldest()
            self.loader.place(identity, self.pool.alloc(num_pages))
        self.settle()
        assert self.cache.is_ready(identity)

    def is_read(self, names: str) -> list[bool]:
        return [self.loader.lookup(self.ref(name)) is not None for name in names]

    def assert_in_pool(self, name: str) -> None:
        """Its rank rows are found in the pool, byte for byte."""
        pair = self.adapter(name).sites[SITE]
        rows = [*pair.lora_a, *pair.lora_b.t()]
        offsets = self.loader.resident[self.adapter(name).identity].row_offset
        flat = self.storage.view(-1)
        for row, offset in zip(rows, offsets, strict=True):
            assert torch.equal(flat[offset : offset + 64].clone().view(torch.float32), row)


@contextmanager
def bench(names: str, *, num_pages: int = 8, max_pending: int = 4) -> Iterator[Bench]:
    result = Bench(names, num_pages=num_pages, max_pending=max_pending)
    try:
        yield result
    finally:
        result.open_gates()
        result.loader.close()


def test_a_demanded_adapter_is_read_and_placed():
    with bench("a") as b:
        b.demand("a")
        assert b.settle() == {}
        assert b.is_read("a") == [True]
        assert b.cache.pages(b.adapter("a").identity) is None, "it has pages that nobody gave it"
        b.place("a")
        b.assert_in_pool("a")
        assert b.library.loads == {"a": 1}


def test_only_so_many_are_read_ahead_of_their_pages():
    with bench("abcdefgh", max_pending=3) as b:
        requests = [b.demand(name) for name in "abcdefgh"]
        b.settle()
        assert b.is_read("abcdefgh") == [True] * 3 + [False] * 5
        b.place("a")
        assert b.is_read("abcdefgh") == [True] * 4 + [False] * 4
        for request in requests[:4]:
            b.loader.release(request)
        b.settle()
        assert b.is_read("bcd") == [False] * 3, "what nobody wants is still in host memory"
        assert b.is_read("efgh") == [True] * 3 + [False]


def test_a_request_whose_adapters_are_more_than_may_wait_is_read_whole():
    """Only so many of its parts were read, none of them could be placed without the others, and it waited for ever."""
    with bench("abcd", max_pending=2) as b:
        b.demand("abc")
        b.demand("d")
        b.settle()
        assert b.is_read("abcd") == [True, True, True, False]


def test_parts_that_wait_for_other_parts_do_not_take_all_places():
    """s was evicted while the others were read. All of them waited for s, and s for one of their places."""
    with bench("sabz", max_pending=2, num_pages=1) as b:
        warm = b.demand("s")
        b.settle()
        b.place("s")
        b.loader.release(warm)
        for name in "ab":
            b.demand("s" + name)
        b.settle()
        assert b.is_read("sab") == [True, True, True]
        b.demand("z")
        b.cache.evict_oldest()
        b.settle()
        assert b.is_read("sa") == [True, True]
        assert b.loader._images.keys() == {b.adapter(name).identity for name in "sa"}


def test_a_younger_request_is_not_read_ahead_of_an_older_one_that_found_no_room():
    """bcd did not fit beside a, but e did, and was read before it."""
    with bench("abcde", max_pending=2) as b:
        for names in ("a", "bcd", "e"):
            b.demand(names)
        b.settle()
        assert b.library.loads == {"a": 1}
        b.place("a")
        assert b.library.loads == {name: 1 for name in "abcd"}


def test_whose_turn_comes_next_is_read_before_older_ones():
    with bench("abcdef", max_pending=2) as b:
        b.library.held_up["a"] = threading.Event()
        requests = {name: b.demand(name) for name in "abcdef"}
        b.settle()
        assert b.library.loads == {"b": 1}, "who is not preferred comes in order of arrival"
        b.loader.prefer([requests["e"], requests["d"]])
        b.settle()
        assert b.library.loads == {"b": 1, "e": 1}, "what is being read takes a place until it is done"
        b.open_gates()
        b.loader.wait(1)
        b.settle()
        assert b.library.loads == {"b": 1, "e": 1, "a": 1, "d": 1}
        assert b.is_read("abed") == [False, False, True, True], "more images are kept than may wait"


def test_what_is_read_for_one_who_is_still_preferred_is_kept_though_others_come_before():
    """With two tenants whose turns alternate, each reading was dropped for the other's."""
    with bench("abcd", max_pending=2) as b:
        requests = [b.demand(name) for name in "abcd"]
        b.settle()
        for _ in range(5):
            requests.reverse()
            b.loader.prefer(requests.copy())
            b.settle()
        assert b.library.loads == {"a": 1, "b": 1}
        b.place("a")
        b.settle()
        assert b.is_read("abcd") == [True, True, False, True], (
            "d was the first of those preferred in the end"
        )


def test_an_urgent_demand_comes_before_all_that_are_preferred():
    with bench("abcp", max_pending=1) as b:
        requests = [b.demand(name) for name in "abc"]
        b.settle()
        b.loader.prefer(requests[1:])
        b.settle()
        assert b.library.loads == {"a": 1, "b": 1}
        urgent = b.request("p")
        b.loader.demand(urgent, is_urgent=True)
        b.settle()
        assert b.is_read("abcp") == [False, True, False, True]
        b.loader.prefer(requests[2:])
        b.settle()
        assert b.is_read("abcp") == [False, False, True, True], (
            "no urgent one is dropped for a preferred one"
        )


def test_beside_those_who_are_urgent_one_more_is_read_for():
    """A pin may wait for requests that were preempted, and these for adapters that were evicted meanwhile."""
    with bench("abpq", max_pending=1) as b:
        for name in "pq":
            b.loader.demand(b.request(name), is_urgent=True)
        b.settle()
        assert b.is_read("pqab") == [True, False, False, False]
        b.demand("a")
        b.demand("b")
        b.settle()
        assert b.is_read("pqab") == [True, False, True, False]
        b.place("p")
        b.settle()
        assert b.is_read("qab") == [True, True, False]


def test_a_preference_for_those_who_have_gone_harms_nobody():
    with bench("abc", max_pending=1) as b:
        requests = {name: b.demand(name) for name in "abc"}
        b.loader.release(requests["c"])
        b.loader.prefer([requests["c"], requests["b"]])
        b.settle()
        assert b.is_read("abc") == [False, True, False]


def test_a_step_that_changes_nothing_does_not_look_through_the_queue():
    """With 10,000 requests queued, each poll took 5 ms."""

    class CountsWalks(dict[Request, None]):
        num_walks = 0

        def __iter__(self) -> Iterator[Request]:
            self.num_walks += 1
            return super().__iter__()

    with bench("ab", max_pending=1) as b:
        queue = CountsWalks()
        b.loader._demand = queue  # type: ignore[assignment]  # its keys are requests here
        first, *_ = [b.demand(name) for name in "ab" * 5]
        b.settle()
        b.place("a")
        assert queue.num_walks > 0, "nothing that it does is seen"
        queue.num_walks = 0
        b.loader.release(first)  # it ran
        b.demand("a")
        b.demand("b")
        for _ in range(10):
            b.loader.poll()
            b.loader.prefer([])
        assert queue.num_walks == 0
        b.cache.evict_oldest()
        b.loader.poll()
        assert queue.num_walks == 1
        b.settle()
        assert b.is_read("ab") == [False, True], "what was evicted waits for its turn behind the older ones"
        b.place("b")
        assert b.is_read("ab") == [True, True]
        for request in list(queue):
            b.loader.release(request)
        b.settle()
        assert b.loader._images == {}


def test_the_demand_of_one_request_outlives_that_of_another():
    with bench("a") as b:
        first, _second = b.demand("a"), b.demand("a")
        b.loader.release(first)
        b.settle()
        assert b.is_read("a") == [True]
        assert b.library.loads == {"a": 1}


def test_a_reading_that_nobody_waits_for_is_not_begun():
    with bench("abcd") as b:
        for name in "ab":  # both reading threads
            b.library.held_up[name] = threading.Event()
            b.demand(name)
        gone, kept = b.demand("c"), b.demand("d")
        b.loader.release(gone)
        b.loader.poll()
        for gate in b.library.held_up.values():
            gate.set()
        b.library.held_up.clear()
        b.settle()
        assert b.library.loads == {"a": 1, "b": 1, "d": 1}
        b.loader.release(kept)


def test_a_failure_is_told_once_and_harms_nobody():
    with bench("abc") as b:
        b.library.broken.add("b")
        b.mismatched.add(b.adapter("c").identity)
        requests = {name: b.demand(name) for name in "abc"}
        failures: dict[str, Exception] = {}
        while len(failures) < 2:
            b.loader.wait(1)
            for key, error in b.loader.poll().items():
                assert isinstance(key, AdapterRef)
                assert key.name not in failures
                failures[key.name] = error
                b.loader.release(requests[key.name])  # the engine ends the request
        assert isinstance(failures["b"], AdapterFormatError)
        assert isinstance(failures["c"], AdapterMismatchError)
        assert b.settle() == {}
        b.place("a")
        b.assert_in_pool("a")


def test_what_failed_is_read_again_for_a_later_request():
    with bench("a") as b:
        b.library.broken.add("a")
        request = b.demand("a")
        b.loader.wait(5)
        (error,) = b.loader.poll().values()
        assert isinstance(error, AdapterError)
        b.loader.release(request)
        b.library.broken.clear()
        b.demand("a")
        assert b.settle() == {}
        assert b.is_read("a") == [True]


def test_names_of_one_content_take_pages_once_and_are_read_once_when_that_is_known():
    with bench("ab", num_pages=1) as b:
        b.library.add("twin", adapter(0))
        twin = b.ref("twin")
        request = Request(
            "twins", 99, (1,), SamplingParams(), 1, BASE, ((b.ref("a"), 1.0), (twin, 1.0))
        )  # fmt: skip
        b.loader.demand(request)
        b.settle()
        assert b.loader.lookup(twin) == b.loader.lookup(b.ref("a"))
        assert len(b.loader._images) == 1
        b.place("a")
        assert b.cache.resident_pages == 1
        before = b.library.loads.total()
        b.cache.evict_oldest()
        b.settle()
        assert b.library.loads.total() == before + 1
        assert b.loader.lookup(twin) is not None


def test_a_late_failure_of_another_name_does_not_fail_what_is_resident():
    with bench("a") as b:
        b.library.add("twin", adapter(0))
        twin = b.ref("twin")
        gate = b.library.held_up["twin"] = threading.Event()
        b.library.broken.add("twin")
        b.demand("a")
        b.loader.demand(Request("late", 98, (1,), SamplingParams(), 1, BASE, ((twin, 1.0),)))
        b.settle()
        b.place("a")
        b.library.loads["twin"] += 1  # by now its content is known from elsewhere
        gate.set()
        b.library.held_up.clear()
        assert b.settle() == {}
        assert b.loader.lookup(twin) is not None


def test_what_is_evicted_while_a_request_waits_is_read_again_and_lies_elsewhere():
    with bench("ab", num_pages=2) as b:
        b.demand("a")
        b.settle()
        b.place("a")
        before = b.loader.resident[b.adapter("a").identity]
        b.cache.evict_oldest()
        taken = b.pool.alloc(1)  # the page on which it lay
        b.settle()
        assert b.loader.resident == {}
        b.place("a")
        after = b.loader.resident[b.adapter("a").identity]
        assert (after.row_offset != before.row_offset).all()
        b.assert_in_pool("a")
        assert b.library.loads == {"a": 2}
        b.pool.free(taken)


def test_nothing_is_read_while_it_is_resident_or_being_read():
    """Random traffic over more adapters than the pool holds, checked whenever a reading begins."""
    names = "abcdefghij"
    with bench(names, num_pages=3, max_pending=3) as b:
        being_read: Counter[str] = Counter()
        wrong: list[str] = []

        def check(ref: AdapterRef) -> None:
            being_read[ref.name] += 1
            if b.cache.pages(b.adapter(ref.name).identity) is not None or being_read[ref.name] > 1:
                wrong.append(ref.name)

        b.library.on_load = check
        chance, requests = Random(0), []
        num_evictions = 0
        for _ in range(150):
            requests.append(b.demand("".join(chance.sample(names, chance.randint(1, 2)))))
            b.settle()
            being_read.clear()
            for name in {key.name for key, _ in chance.choice(requests).adapters}:  # type: ignore[attr-defined]
                if b.loader.lookup(b.ref(name)) is not None:
                    b.place(name)
                    being_read.clear()
            if len(requests) > 4:
                b.loader.release(requests.pop(0))
            num_evictions = b.cache.stats.evictions
            assert b.state()[1] <= 3
        assert wrong == []
        assert num_evictions > 20
        assert max(b.library.loads.values()) > 1
        assert b.cache.stats.loads <= b.library.loads.total()


def test_any_thread_may_demand_while_another_polls_and_waits():
    with bench("abcdefgh", max_pending=8) as b:
        stop = threading.Event()
        errors: list[BaseException] = []

        def flood(names: str) -> None:
            try:
                while not stop.is_set():
                    for request in [b.demand(name) for name in names]:
                        b.loader.release(request)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=flood, args=(names,)) for names in ("abcd", "efgh")]
        for thread in threads:
            thread.start()
        for _ in range(100):
            b.loader.poll()
            b.loader.wait(0.001)
        stop.set()
        for thread in threads:
            thread.join()
        assert errors == []


def test_nothing_on_its_way_is_not_waited_for():
    with bench("a") as b:
        assert b.loader.wait(30) is False
        b.library.held_up["a"] = threading.Event()
        b.demand("a")
        assert b.loader.wait(0.01) is True


def test_close_ends_the_threads():
    # Libraries of other tests, collected some time later, have threads of their own.
    others = set(threading.enumerate())

    def names() -> set[str]:
        return {thread.name.rsplit("_", 1)[0] for thread in set(threading.enumerate()) - others}

    with bench("a") as b:
        b.demand("a")
        b.settle()
        b.place("a")
        assert names() == {"adapter-reader", "adapter-copier"}
    assert names() == set()


def test_a_loader_may_be_closed_with_readings_outstanding():
    with bench("abcdef", max_pending=6) as b:
        for name in "abcdef":
            b.library.held_up[name] = threading.Event()
            b.demand(name)
        threading.Timer(0.05, b.open_gates).start()
        b.loader.close()
        assert b.library.loads.total() <= 2, "what had not begun was read"
