"""Residency of adapters: who may be evicted, in which order, and that each page comes back once."""

from itertools import count

import pytest
from hypothesis import settings

from manylora.memory import AdapterCache, AdapterCacheStats, PagePool
from tests.memory.lives import AdapterLife

TestAdapterLife = AdapterLife.TestCase
TestAdapterLife.settings = settings(deadline=None, max_examples=50, stateful_step_count=40)


@pytest.fixture
def pool():
    return PagePool(10)


@pytest.fixture
def cache(pool):
    return AdapterCache(pool, count().__next__)


def load(cache, pool, *names, num_pages=2):
    for name in names:
        cache.insert(name, pool.alloc(num_pages))
        cache.mark_ready(name)


def test_the_adapter_used_longest_ago_goes_first(cache, pool):
    load(cache, pool, "a", "b", "c")
    cache.acquire("a")
    cache.release("a")
    evicted: list[str] = []
    while cache.num_evictable_pages:
        before = {name for name in "abc" if cache.pages(name)}
        assert cache.evict_oldest() == 2
        evicted += before - {name for name in "abc" if cache.pages(name)}
    assert evicted == ["b", "c", "a"]
    assert pool.num_free == pool.num_pages


def test_loading_held_and_pinned_adapters_stay(cache, pool):
    cache.insert("loading", pool.alloc(1))
    load(cache, pool, "held", "pinned", "idle", num_pages=1)
    cache.acquire("held")
    cache.pin("pinned")
    assert cache.num_evictable_pages == 1
    cache.evict_oldest()
    assert cache.pages("idle") is None
    assert cache.oldest_idle() is None
    with pytest.raises(AssertionError, match="no adapter is idle"):
        cache.evict_oldest()
    assert all(cache.pages(name) is not None for name in ("loading", "held", "pinned"))


def test_an_adapter_acquired_while_it_loads_stays_when_it_is_ready(cache, pool):
    cache.insert("a", pool.alloc(1))
    cache.acquire("a")
    cache.mark_ready("a")
    assert cache.num_evictable_pages == 0
    cache.release("a")
    assert cache.num_evictable_pages == 1


def test_pinning_twice_is_pinning_once(cache, pool):
    load(cache, pool, "a")
    cache.pin("a")
    cache.pin("a")
    cache.unpin("a")
    assert cache.num_evictable_pages == 2


def test_stats_count_loads_hits_and_evictions(cache, pool):
    cache.insert("a", pool.alloc(1))
    cache.acquire("a")  # still loading: no hit
    cache.mark_ready("a")
    cache.acquire("a")
    for _ in range(2):
        cache.release("a")
    cache.evict_oldest()
    load(cache, pool, "a")
    cache.drop("a")  # unloaded on purpose: no eviction
    assert cache.stats == AdapterCacheStats(loads=2, hits=1, evictions=1)


@pytest.mark.parametrize("state", ["loading", "idle", "pinned"])
def test_a_dropped_adapter_is_forgotten_whatever_its_state(cache, pool, state):
    cache.insert("a", pool.alloc(2))
    if state != "loading":
        cache.mark_ready("a")
    if state == "pinned":
        cache.pin("a")
    cache.drop("a")
    cache.check_integrity()
    assert cache.pages("a") is None
    assert cache.oldest_idle() is None
    assert (cache.num_evictable_pages, cache.resident_pages, pool.num_free) == (0, 0, pool.num_pages)
    load(cache, pool, "a")
    assert cache.num_evictable_pages == 2, "the pin outlived its adapter"


def test_dropping_or_releasing_out_of_turn_is_an_assertion(cache, pool):
    load(cache, pool, "a")
    cache.acquire("a")
    with pytest.raises(AssertionError, match="adapter a is held by 1 requests"):
        cache.drop("a")
    cache.release("a")
    with pytest.raises(AssertionError, match="released more often than acquired"):
        cache.release("a")


def test_check_integrity_notices_a_shared_page_and_a_stale_count(cache, pool):
    load(cache, pool, "a")
    cache.check_integrity()
    pool.share(cache.pages("a"))
    with pytest.raises(AssertionError, match="free or shared"):
        cache.check_integrity()
    pool.free(cache.pages("a"))
    cache._num_evictable_pages += 1
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_pinned_pages_are_counted_once_and_while_they_are_pinned(cache, pool):
    load(cache, pool, "a", "b", num_pages=2)
    cache.pin("a")
    cache.pin("a")
    cache.pin("b")
    assert (cache.num_pinned_pages, cache.is_pinned("a"), cache.is_pinned("absent")) == (4, True, False)
    cache.unpin("a")
    cache.unpin("a")
    assert (cache.num_pinned_pages, cache.is_pinned("a")) == (2, False)
    cache.drop("b")
    assert cache.num_pinned_pages == 0


def test_residency_tells_of_every_arrival_and_departure_and_of_nothing_else(cache, pool):
    seen = [cache.residency]
    load(cache, pool, "a", "b", num_pages=1)
    seen.append(cache.residency)
    cache.acquire("a")
    cache.release("a")
    cache.pin("a")
    cache.unpin("a")
    assert cache.residency == seen[-1]
    cache.evict_oldest()
    seen.append(cache.residency)
    cache.drop("a" if cache.pages("a") else "b")
    seen.append(cache.residency)
    assert seen == sorted(set(seen))
    assert cache.num_resident == 0
