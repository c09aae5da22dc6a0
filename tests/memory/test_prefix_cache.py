"""KV pages by content: only equal tokens under an equal salt share, and no page is evicted before its children."""

from itertools import count

import pytest
from hypothesis import settings

from manylora.memory import PagePool, PrefixCache
from tests.memory.lives import PrefixLife

TestPrefixLife = PrefixLife.TestCase
TestPrefixLife.settings = settings(deadline=None, max_examples=50, stateful_step_count=40)

TOKENS = [5, 6, 7, 8, 9, 10]


@pytest.fixture
def pool():
    return PagePool(20)


@pytest.fixture
def cache(pool):
    return PrefixCache(pool, page_tokens=2, clock=count().__next__)


def keep(cache, pool, tokens, salt=b""):
    """A sequence that came, was computed, and went."""
    pages = pool.alloc(-(-len(tokens) // 2))
    cache.insert(tokens, pages, salt)
    pool.free(pages)
    return pages


def test_the_last_token_is_never_matched(cache, pool):
    pages = keep(cache, pool, TOKENS)
    assert cache.match([*TOKENS, 11], b"") == pages
    assert cache.match(TOKENS, b"") == pages[:2]
    assert cache.match(TOKENS, b"", max_tokens=100) == pages[:2]
    assert cache.match(TOKENS, b"", max_tokens=3) == pages[:1]
    assert cache.match([], b"") == []


def test_other_tokens_or_another_salt_share_nothing(cache, pool):
    pages = keep(cache, pool, TOKENS, salt=b"alice")
    assert cache.match(TOKENS, b"bob") == []
    assert cache.match([5, 0, *TOKENS[2:]], b"alice") == []
    assert cache.match([*TOKENS[:2], 0, *TOKENS[3:]], b"alice") == pages[:1]
    assert cache.match(TOKENS[2:], b"alice") == []  # the same tokens elsewhere have other KV


def test_a_page_that_is_not_full_is_not_kept(cache, pool):
    pages = keep(cache, pool, TOKENS[:5])
    assert cache.num_pages == 2
    assert pool.refs(pages[2]) == 0


def test_the_first_of_two_equal_pages_is_kept_and_later_pages_follow_it(cache, pool):
    first = keep(cache, pool, TOKENS[:2])
    second = keep(cache, pool, TOKENS)
    assert pool.refs(second[0]) == 0
    assert cache.match([*TOKENS, 11], b"") == [first[0], *second[1:]]


def test_a_page_is_not_idle_while_a_request_holds_a_page_after_it(cache, pool):
    keep(cache, pool, TOKENS[:2])
    assert cache.num_evictable_pages == 1
    pages = pool.alloc(2)
    cache.insert(TOKENS[:4], pages, b"")  # its own copy of the first page is not the cached one
    pool.free(pages[:1])
    assert cache.num_unheld_pages == 1
    assert cache.num_evictable_pages == 0
    pool.free(pages[1:])
    assert cache.num_evictable_pages == 2


def test_the_branch_used_longest_ago_goes_first_and_from_its_end(cache, pool):
    left = keep(cache, pool, [1, 1, 2, 2])
    keep(cache, pool, [1, 1, 3, 3])
    pool.free(cache.match([1, 1, 2, 2, 0], b""))
    evicted: list[int] = []
    while cache.num_evictable_pages:
        held = {page for page in range(20) if pool.refs(page)}
        cache.evict_oldest()
        evicted += held - {page for page in range(20) if pool.refs(page)}
    assert len(evicted) == 3
    assert evicted[1:] == [left[1], left[0]]
    with pytest.raises(AssertionError, match="no page is idle"):
        cache.evict_oldest()


def test_equal_hashes_do_not_make_equal_pages(cache, pool, monkeypatch):
    class Colliding(bytes):
        __hash__ = lambda self: 0  # noqa: E731
        __eq__ = bytes.__eq__

    keys = cache._token_keys
    monkeypatch.setattr(cache, "_token_keys", lambda tokens, limit: map(Colliding, keys(tokens, limit)))
    pages = keep(cache, pool, TOKENS)
    assert cache.match([*TOKENS, 11], b"") == pages
    assert cache.match([1, 2, 3, 4], b"") == []


def test_a_disabled_cache_keeps_and_finds_nothing(pool):
    cache = PrefixCache(pool, page_tokens=2, clock=count().__next__, enabled=False)
    keep(cache, pool, TOKENS)
    assert cache.match(TOKENS, b"") == []
    assert pool.num_free == pool.num_pages


def test_freeing_the_caches_own_reference_is_an_assertion(cache, pool):
    pages = keep(cache, pool, TOKENS)
    with pytest.raises(AssertionError, match="the cache's own reference was freed"):
        pool.free(pages)


def test_one_page_under_two_chains_is_an_assertion(cache, pool):
    pages = pool.alloc(1)
    cache.insert([1, 1], pages, b"")
    with pytest.raises(AssertionError, match="cached already, for other tokens"):
        cache.insert([2, 2], pages, b"")


def test_check_integrity_notices_a_wrong_order_and_a_lost_page(cache, pool):
    pages = keep(cache, pool, TOKENS)
    cache.check_integrity()
    cache._idle.move_to_end(pages[0], last=False)
    with pytest.raises(AssertionError, match=r"idle after its parent|order of its ticks"):
        cache.check_integrity()
    cache._idle.move_to_end(pages[0])
    cache._by_page.pop(pages[1])
    with pytest.raises(AssertionError):
        cache.check_integrity()
