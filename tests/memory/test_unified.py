"""One pool for both: who is evicted, when nobody is, and that pages add up."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from manylora.errors import CapacityError
from manylora.memory import MemoryUse, UnifiedMemory
from tests.memory.lives import AdapterLife, Chain, PrefixLife


class MemoryLife(AdapterLife, PrefixLife):
    """Adapters and sequences take their pages from one memory, which must evict exactly what the model says."""

    @initialize(num_pages=st.integers(1, 20), page_tokens=st.integers(1, 3))
    def begin(self, num_pages, page_tokens):
        self.memory = UnifiedMemory(num_pages, page_tokens)
        self.pool, self.now = self.memory.pool, 0
        self.begin_adapters(self.memory.adapters)
        self.begin_prefixes(self.memory.prefixes, page_tokens)

    def take(self, n):
        # Sequences in the making hold what they matched, so recount who is idle before predicting evictions.
        self.check()
        idle_pages = sum(len(self.model_adapters[name].pages) for name in self.adapter_idle_since)
        idle_pages += len(self.prefix_idle_since)
        before = self.memory.use
        if n > before.free + idle_pages:
            assert not self.memory.can_alloc(n)
            with pytest.raises(
                CapacityError, match=f"asked for {n} pages; .* {before.free} are free and {idle_pages} "
            ):
                self.memory.alloc(n)
            assert self.memory.use == before, "evicted although that could not suffice"
            return None
        assert self.memory.can_alloc(n)
        pages = self.memory.alloc(n)
        self.predict_evictions(n - before.free)
        return pages

    def predict_evictions(self, wanted):
        # No step makes both an adapter and a page idle; of the pages of one sequence the last is idle first.
        idle: list[tuple[int, int, str | Chain]] = [
            *((since, 0, name) for name, since in self.adapter_idle_since.items()),
            *((since, -len(chain[1]), chain) for chain, since in self.prefix_idle_since.items()),
        ]
        for *_, oldest in sorted(idle, key=lambda entry: entry[:2]):
            if wanted <= 0:
                break
            if isinstance(oldest, str):
                wanted -= len(self.model_adapters[oldest].pages)
                self.forget_adapter(oldest)
            else:
                wanted -= 1
                self.forget_chain(oldest)

    def check(self):
        AdapterLife.check(self)
        PrefixLife.check(self)
        self.memory.check_integrity()
        in_use = {page for sequence in self.sequences for page in sequence.pages}
        assert self.memory.use == MemoryUse(
            adapters=sum(len(adapter.pages) for adapter in self.model_adapters.values()),
            kv_in_use=len(in_use),
            prefix_only=len(set(self.cached.values()) - in_use),
            free=self.pool.num_pages - len(self.expected_refs()),
        )


TestMemoryLife = MemoryLife.TestCase
TestMemoryLife.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def idle_adapter(memory, name, num_pages):
    memory.adapters.insert(name, memory.alloc(num_pages))
    memory.adapters.mark_ready(name)


def idle_prefix(memory, token):
    pages = memory.alloc(1)
    memory.prefixes.insert([token] * memory.page_tokens, pages, b"")
    memory.pool.free(pages)


def test_what_has_been_idle_longest_goes_first_whatever_it_is():
    memory = UnifiedMemory(num_pages=4, page_tokens=2)
    idle_prefix(memory, token=1)
    idle_adapter(memory, "old", 1)
    idle_prefix(memory, token=2)
    idle_adapter(memory, "new", 1)
    left = []
    for _ in range(4):
        memory.alloc(1)
        left.append((memory.use.prefix_only, memory.adapters.pages("old"), memory.adapters.pages("new")))
    assert [(prefixes, old is not None, new is not None) for prefixes, old, new in left] == [
        (1, True, True),
        (1, False, True),
        (0, False, True),
        (0, False, False),
    ]


def test_nothing_is_evicted_for_a_request_that_cannot_be_served():
    memory = UnifiedMemory(num_pages=6, page_tokens=2)
    idle_adapter(memory, "a", 2)
    idle_prefix(memory, token=1)
    memory.alloc(1)
    with pytest.raises(CapacityError) as refusal:
        memory.alloc(6)
    assert str(refusal.value) == (
        "asked for 6 pages; of 6, 2 are free and 3 evictable (idle adapters 2, idle prefixes 1)"
    )
    assert memory.use == MemoryUse(adapters=2, kv_in_use=1, prefix_only=1, free=2)
    assert memory.can_alloc(5)
    assert len(memory.alloc(5)) == 5


def test_what_a_request_has_matched_is_not_evicted_for_its_other_pages():
    memory = UnifiedMemory(num_pages=3, page_tokens=2)
    idle_prefix(memory, token=1)
    idle_adapter(memory, "a", 2)
    matched = memory.prefixes.match([1, 1, 1], b"")
    assert memory.can_alloc(2)
    assert not memory.can_alloc(3)
    assert not set(memory.alloc(2)) & set(matched)


def test_without_prefix_caching_nothing_is_kept():
    memory = UnifiedMemory(num_pages=2, page_tokens=2, prefix_caching=False)
    idle_prefix(memory, token=1)
    assert memory.use == MemoryUse(adapters=0, kv_in_use=0, prefix_only=0, free=2)


def test_use_in_bytes():
    use = MemoryUse(adapters=1, kv_in_use=2, prefix_only=3, free=4)
    assert use.in_bytes(10) == MemoryUse(adapters=10, kv_in_use=20, prefix_only=30, free=40)


def test_check_integrity_notices_a_page_of_two_tenants():
    memory = UnifiedMemory(num_pages=2, page_tokens=2)
    pages = memory.alloc(1)
    memory.prefixes.insert([1, 1], pages, b"")
    memory.adapters.insert("a", pages)
    with pytest.raises(AssertionError, match="free or shared"):
        memory.check_integrity()
