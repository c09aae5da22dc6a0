"""The pool hands out each page once, counts its holders, and says so when it cannot."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manylora.errors import CapacityError
from manylora.memory import PageId, PagePool


class PoolLife(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(0, 12))
    def begin(self, num_pages):
        self.pool, self.held = PagePool(num_pages), []

    @rule(n=st.integers(0, 6))
    def alloc(self, n):
        free = self.pool.num_free
        if n <= free:
            self.held.append(self.pool.alloc(n))
            assert len(self.held[-1]) == n
        else:
            with pytest.raises(
                CapacityError, match=f"asked for {n} pages; {free} of {self.pool.num_pages} are free"
            ):
                self.pool.alloc(n)
            assert self.pool.num_free == free

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.sampled_from(self.held))
        some = pages[: data.draw(st.integers(0, len(pages)))]
        self.pool.share(some)
        self.held.append(some)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def sound(self):
        self.pool.check_integrity()
        refs = Counter(page for pages in self.held for page in pages)
        assert all(
            self.pool.refs(PageId(page)) == refs[PageId(page)] for page in range(self.pool.num_pages)
        )
        assert self.pool.num_free + len(refs) == self.pool.num_pages


TestPoolLife = PoolLife.TestCase
TestPoolLife.settings = settings(deadline=None, max_examples=50, stateful_step_count=30)


def test_the_page_freed_last_is_handed_out_first():
    pool = PagePool(8)
    first, second, _ = pool.alloc(3)
    pool.free([first])
    pool.free([second])
    assert pool.alloc(2) == [second, first]


def test_freeing_or_sharing_a_free_page_is_an_assertion():
    pool = PagePool(2)
    pages = pool.alloc(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match=f"page {pages[0]} is freed more often than it was held"):
        pool.free(pages)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share(pages)


def test_a_watcher_hears_of_every_holder_until_it_stops_watching():
    pool, heard = PagePool(2), []
    (page,) = pool.alloc(1)
    pool.watch(page, lambda *change: heard.append(change))
    pool.share([page])
    pool.free([page])
    pool.unwatch(page)
    pool.free([page])
    assert heard == [(page, 2), (page, 1)]


def test_check_integrity_notices_a_page_that_is_lost_and_one_that_is_free_twice():
    lost = PagePool(3)
    lost._free.pop()
    twice = PagePool(3)
    twice._free.append(twice._free[0])
    held = PagePool(3)
    held._free += held.alloc(1)
    for pool in (lost, twice, held):
        with pytest.raises(AssertionError):
            pool.check_integrity()
