"""Random lives of the caches, against models that are slow and obvious: whole token tuples, recounted references."""

from collections import Counter
from dataclasses import dataclass
from itertools import count

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manylora.memory import AdapterCache, PageId, PagePool, PrefixCache

ANY = st.integers(0, 10**6)
"""Picks one of however many there are."""


class Life(RuleBasedStateMachine):
    """A pool, and a count of the steps taken so far."""

    pool: PagePool
    now: int

    def take(self, n: int) -> list[PageId] | None:
        """Pages for somebody new; None if there is no room."""
        return self.pool.alloc(n) if n <= self.pool.num_free else None

    def expected_refs(self) -> Counter[PageId]:
        return Counter()

    @invariant()
    def sound(self) -> None:
        self.now += 1
        self.check()
        refs = self.expected_refs()
        assert all(
            self.pool.refs(PageId(page)) == refs[PageId(page)] for page in range(self.pool.num_pages)
        )
        assert self.pool.num_free + len(refs) == self.pool.num_pages
        self.pool.check_integrity()

    def check(self) -> None:
        raise NotImplementedError


@dataclass
class ModelAdapter:
    pages: list[PageId]
    ready: bool = False
    refs: int = 0
    pinned: bool = False


class AdapterLife(Life):
    adapters: AdapterCache
    model_adapters: dict[str, ModelAdapter]
    adapter_idle_since: dict[str, int]
    hits: int

    @initialize(num_pages=st.integers(1, 12))
    def begin(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.begin_adapters(AdapterCache(self.pool, count().__next__))
        self.now = 0

    def begin_adapters(self, adapters: AdapterCache) -> None:
        self.adapters, self.model_adapters, self.adapter_idle_since, self.hits = adapters, {}, {}, 0

    def pick(self, any_: int) -> str:
        return sorted(self.model_adapters)[any_ % len(self.model_adapters)]

    @rule(any_=ANY, num_pages=st.integers(1, 4))
    def load(self, any_: int, num_pages: int) -> None:
        absent = sorted(set("abcdef") - self.model_adapters.keys())
        if not absent:
            return
        name = absent[any_ % len(absent)]
        assert self.adapters.pages(name) is None
        pages = self.take(num_pages)
        if pages is not None:
            self.adapters.insert(name, pages)
            self.model_adapters[name] = ModelAdapter(pages)

    @precondition(lambda self: not all(adapter.ready for adapter in self.model_adapters.values()))
    @rule()
    def mark_ready(self) -> None:
        for name, adapter in self.model_adapters.items():
            if not adapter.ready:
                self.adapters.mark_ready(name)
                adapter.ready = True
                break  # one a step: adapters that become idle have an order

    @precondition(lambda self: self.model_adapters)
    @rule(any_=ANY)
    def acquire(self, any_: int) -> None:
        name = self.pick(any_)
        self.adapters.acquire(name)
        self.model_adapters[name].refs += 1
        self.hits += self.model_adapters[name].ready

    @precondition(lambda self: any(adapter.refs for adapter in self.model_adapters.values()))
    @rule(any_=ANY)
    def release(self, any_: int) -> None:
        held = sorted(name for name, adapter in self.model_adapters.items() if adapter.refs)
        name = held[any_ % len(held)]
        self.adapters.release(name)
        self.model_adapters[name].refs -= 1

    @precondition(lambda self: self.model_adapters)
    @rule(any_=ANY)
    def use(self, any_: int) -> None:
        """A request that came and went."""
        self.acquire(any_)
        name = self.pick(any_)
        self.adapters.release(name)
        self.model_adapters[name].refs -= 1
        self.adapter_idle_since.pop(name, None)

    @precondition(lambda self: self.model_adapters)
    @rule(any_=ANY)
    def pin(self, any_: int) -> None:
        name = self.pick(any_)
        self.adapters.pin(name)
        self.model_adapters[name].pinned = True

    @precondition(lambda self: any(adapter.pinned for adapter in self.model_adapters.values()))
    @rule()
    def unpin(self) -> None:
        name = min(name for name, adapter in self.model_adapters.items() if adapter.pinned)
        self.adapters.unpin(name)
        self.model_adapters[name].pinned = False

    @precondition(lambda self: self.model_adapters)
    @rule(any_=ANY)
    def drop(self, any_: int) -> None:
        name = self.pick(any_)
        if self.model_adapters[name].refs == 0:
            self.adapters.drop(name)
            del self.model_adapters[name]

    @precondition(lambda self: self.adapter_idle_since)
    @rule()
    def evict_adapter(self) -> None:
        name = min(self.adapter_idle_since, key=self.adapter_idle_since.__getitem__)
        assert self.adapters.evict_oldest() == len(self.model_adapters[name].pages)
        self.forget_adapter(name)

    def forget_adapter(self, name: str) -> None:
        assert self.adapters.pages(name) is None
        del self.model_adapters[name], self.adapter_idle_since[name]

    def expected_refs(self) -> Counter[PageId]:
        return super().expected_refs() + Counter(
            page for adapter in self.model_adapters.values() for page in adapter.pages
        )

    def check(self) -> None:
        idle = {n for n, a in self.model_adapters.items() if a.ready and not a.refs and not a.pinned}
        self.adapter_idle_since = {name: self.adapter_idle_since.get(name, self.now) for name in idle}
        self.adapters.check_integrity()
        assert self.adapters.num_evictable_pages == sum(len(self.model_adapters[n].pages) for n in idle)
        assert self.adapters.resident_pages == sum(len(a.pages) for a in self.model_adapters.values())
        assert (self.adapters.oldest_idle() is None) == (not idle)
        assert self.adapters.stats.hits == self.hits
        for name, adapter in self.model_adapters.items():
            assert self.adapters.pages(name) == tuple(adapter.pages)
            assert self.adapters.is_ready(name) == adapter.ready


@dataclass
class ModelSequence:
    tokens: tuple[int, ...]
    salt: bytes
    pages: list[PageId]


Chain = tuple[bytes, tuple[int, ...]]
"""Salt and all tokens up to a page's end."""


class PrefixLife(Life):
    prefixes: PrefixCache
    page_tokens: int
    sequences: list[ModelSequence]
    cached: dict[Chain, PageId]
    prefix_idle_since: dict[Chain, int]
    hit_tokens: int

    # Beginnings of few texts that begin alike, under few salts, so that many a page is shared.
    some_tokens = st.builds(
        lambda text, length: tuple(map(int, text[:length])),
        st.sampled_from(["000000000", "000011111", "010101010"]),
        st.integers(1, 9),
    )
    some_salt = st.sampled_from([b"", b"mixture"])

    @initialize(num_pages=st.integers(1, 16), page_tokens=st.integers(1, 3))
    def begin(self, num_pages: int, page_tokens: int) -> None:
        self.pool = PagePool(num_pages)
        self.begin_prefixes(PrefixCache(self.pool, page_tokens, count().__next__), page_tokens)
        self.now = 0

    def begin_prefixes(self, prefixes: PrefixCache, page_tokens: int) -> None:
        self.prefixes, self.page_tokens = prefixes, page_tokens
        self.sequences, self.cached, self.prefix_idle_since, self.hit_tokens = [], {}, {}, 0

    def chains(self, tokens: tuple[int, ...], salt: bytes) -> list[Chain]:
        ends = range(self.page_tokens, len(tokens) + 1, self.page_tokens)
        return [(salt, tokens[:end]) for end in ends]

    @rule(tokens=some_tokens, salt=some_salt, max_tokens=st.none() | st.integers(0, 9))
    def start(self, tokens: tuple[int, ...], salt: bytes, max_tokens: int | None) -> None:
        limit = len(tokens) - 1 if max_tokens is None else min(max_tokens, len(tokens) - 1)
        expected = []
        for chain in self.chains(tokens[:limit], salt):
            if chain not in self.cached:
                break
            expected.append(self.cached[chain])
            self.prefix_idle_since.pop(chain, None)  # touched, even if let go of at once
        pages = self.prefixes.match(tokens, salt, max_tokens=max_tokens)
        assert pages == expected
        assert len(pages) * self.page_tokens < len(tokens)
        self.hit_tokens += len(pages) * self.page_tokens

        self.sequences.append(ModelSequence(tokens, salt, pages))
        rest = self.take(-(-len(tokens) // self.page_tokens) - len(pages))
        if rest is None:
            self.end(len(self.sequences) - 1)
        else:
            pages += rest

    @precondition(lambda self: self.sequences)
    @rule(any_=ANY, more=some_tokens)
    def grow(self, any_: int, more: tuple[int, ...]) -> None:
        sequence = self.sequences[any_ % len(self.sequences)]
        tokens = sequence.tokens + more
        rest = self.take(-(-len(tokens) // self.page_tokens) - len(sequence.pages))
        if rest is not None:
            sequence.tokens = tokens
            sequence.pages += rest

    @precondition(lambda self: self.sequences)
    @rule(any_=ANY)
    def insert(self, any_: int) -> None:
        sequence = self.sequences[any_ % len(self.sequences)]
        self.prefixes.insert(sequence.tokens, sequence.pages, sequence.salt)
        chains = self.chains(sequence.tokens, sequence.salt)
        for chain, page in zip(chains, sequence.pages, strict=False):
            self.cached.setdefault(chain, page)

    @precondition(lambda self: self.sequences)
    @rule(any_=ANY)
    def end(self, any_: int) -> None:
        self.pool.free(self.sequences.pop(any_ % len(self.sequences)).pages)

    @rule(tokens=some_tokens, salt=some_salt)
    def come_and_go(self, tokens: tuple[int, ...], salt: bytes) -> None:
        num_running = len(self.sequences)
        self.start(tokens, salt, None)
        if len(self.sequences) > num_running:
            self.insert(num_running)
            self.end(num_running)

    @precondition(lambda self: self.prefix_idle_since)
    @rule()
    def evict_prefix(self) -> None:
        chain = self.oldest_chain()
        assert self.prefixes.evict_oldest() == 1
        assert self.pool.refs(self.cached[chain]) == 0
        self.forget_chain(chain)

    def oldest_chain(self) -> Chain:
        # Pages of one sequence become idle in one step, the last page first.
        return min(
            self.prefix_idle_since, key=lambda chain: (self.prefix_idle_since[chain], -len(chain[1]))
        )

    def forget_chain(self, chain: Chain) -> None:
        del self.cached[chain], self.prefix_idle_since[chain]
        assert not any(
            salt == chain[0] and tokens[: len(chain[1])] == chain[1] for salt, tokens in self.cached
        ), "a page was evicted before a page that follows it"

    def expected_refs(self) -> Counter[PageId]:
        held = Counter(page for sequence in self.sequences for page in sequence.pages)
        return super().expected_refs() + held + Counter(self.cached.values())

    def check(self) -> None:
        held = {page for sequence in self.sequences for page in sequence.pages}
        busy = {
            (salt, tokens[:end])
            for (salt, tokens), page in self.cached.items()
            if page in held
            for end in range(1, len(tokens) + 1)
        }
        idle = self.cached.keys() - busy
        self.prefix_idle_since = {chain: self.prefix_idle_since.get(chain, self.now) for chain in idle}
        self.prefixes.check_integrity()
        assert self.prefixes.num_pages == len(self.cached)
        assert self.prefixes.num_evictable_pages == len(idle)
        assert self.prefixes.num_unheld_pages == len(set(self.cached.values()) - held)
        assert (self.prefixes.oldest_idle() is None) == (not idle)
        assert self.prefixes.stats.hit_tokens == self.hit_tokens
