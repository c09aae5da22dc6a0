"""A scheduler in a world of its own: adapters arrive when the test says so, tokens are made up, nothing is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from random import Random

from manylora.errors import OverloadedError
from manylora.lifecycle import FinishReason
from manylora.lora.adapter import AdapterId
from manylora.lora.mixture import BASE
from manylora.memory.block_table import BlockTable
from manylora.memory.pages import PageId
from manylora.memory.unified import UnifiedMemory
from manylora.text.params import SamplingParams
from manylora.text.policy import FirstComeFirstServed, Policy
from manylora.text.scheduler import Scheduled, Scheduler
from manylora.text.sequence import AdapterKey, Request, Sequence


class FakeSupply:
    """Adapters as names and sizes. Each is away, read, being copied or ready; only the test moves it on."""

    def __init__(self, memory: UnifiedMemory, sizes: Mapping[str, int]) -> None:
        """sizes: pages of each adapter. Names "x" and "x'" have one content."""
        self._cache = memory.adapters
        self._sizes = sizes
        self.images: set[AdapterId] = set()
        self.copying: list[AdapterId] = []
        self.preferred: list[Request] = []

    def prefer(self, requests: SequenceOf[Request]) -> None:
        self.preferred = list(requests)

    def lookup(self, key: AdapterKey) -> tuple[AdapterId, int] | None:
        identity = content(str(key))
        known = identity in self.images or self._cache.pages(identity) is not None
        return (identity, self._sizes[identity]) if known else None

    def place(self, identity: AdapterId, pages: list[PageId]) -> None:
        assert len(pages) == self._sizes[identity]
        self.images.remove(identity)
        self._cache.insert(identity, pages)
        self.copying.append(identity)

    def load_s(self, request: Request) -> float:
        return 0.0 if all(self._cache.is_ready(content(str(key))) for key, _ in request.adapters) else 0.5

    def read(self, name: str) -> None:
        if self._cache.pages(content(name)) is None:
            self.images.add(content(name))

    def finish_copy(self, name: str) -> None:
        self.copying.remove(content(name))
        self._cache.mark_ready(content(name))


def content(name: str) -> AdapterId:
    return AdapterId(name.removesuffix("'"))


class World:
    """A scheduler, its memory and its supply, and the sequences that have not ended. Every step is checked."""

    def __init__(
        self,
        num_pages: int,
        sizes: Mapping[str, int] | None = None,
        *,
        policy: Policy | None = None,
        page_tokens: int = 2,
        max_batch_tokens: int = 8,
        max_num_seqs: int = 4,
        prefix_caching: bool = True,
    ) -> None:
        self.memory = UnifiedMemory(num_pages, page_tokens, prefix_caching=prefix_caching)
        self.sizes = sizes or {}
        self.supply = FakeSupply(self.memory, self.sizes)
        self.max_batch_tokens, self.max_num_seqs = max_batch_tokens, max_num_seqs
        self.scheduler = Scheduler(
            self.memory,
            self.supply,
            policy or FirstComeFirstServed(),
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            clock=lambda: self.now,
        )
        self.live: list[Sequence] = []
        self.rejected: list[Sequence] = []
        self.pinned: set[AdapterId] = set()
        self.num_requests = 0
        self.now = 0.0
        """Seconds; a step takes half of one."""

    def submit(
        self,
        prompt: SequenceOf[int] | int,
        max_tokens: int = 4,
        mixture: str | Mapping[str, float] = "",
        n: int = 1,
        *,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> list[Sequence]:
        """Add a request and return its n sequences. mixture: one letter for each adapter, or weights by name."""
        weights = dict.fromkeys(mixture, 1.0) if isinstance(mixture, str) else dict(mixture)
        # Unless the test says otherwise, prompts have nothing in common.
        first = 1000 * (1 + self.num_requests)
        tokens = tuple(range(first, first + prompt)) if isinstance(prompt, int) else tuple(prompt)
        request = Request(
            request_id=f"request-{self.num_requests}",
            arrival=self.num_requests,
            prompt=tokens,
            params=SamplingParams(n=n),
            max_tokens=max_tokens,
            mixture=BASE,
            adapters=tuple(weights.items()),
            tenant=tenant,
            submitted_at=self.now,
            deadline=None if deadline_s is None else self.now + deadline_s,
        )
        self.num_requests += 1
        sequences = [
            Sequence(request, index, list(tokens), BlockTable(self.memory.page_tokens))
            for index in range(n)
        ]
        self.live += sequences
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    def step(self, *, token: int = 7) -> list[Sequence]:
        """Schedule and check a step, then do as if it had been computed; returns who was in it."""
        scheduled = self.scheduler.schedule()
        for sequence, error in self.scheduler.take_rejected():
            if isinstance(error, OverloadedError):
                deadline = sequence.request.deadline
                assert deadline is not None
                assert sequence.num_cached is None, "it had been served in part"
            else:
                assert not self.could_fit(sequence, beside=self.pinned)
            self.live.remove(sequence)
            self.rejected.append(sequence)
        self.check_step(scheduled)
        if scheduled:
            self.scheduler.stepped(scheduled, 0.5)
        self.now += 0.5
        for s in scheduled:
            sampled = s.samples
            self.scheduler.update(s, token if sampled else None)
            if sampled and len(s.sequence.output) == s.sequence.request.max_tokens:
                self.finish(s.sequence)
        self.check()
        return [s.sequence for s in scheduled]

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        sequence.lifecycle.finish(FinishReason.LENGTH)
        self.live.remove(sequence)

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        sequence.lifecycle.cancel()
        self.live.remove(sequence)

    def deliver(self, chance: Random | None = None) -> None:
        """What waiting sequences lack is read and what is being copied gets ready; with `chance`, half of it."""
        for identity in list(self.supply.copying):
            if chance is None or chance.random() < 0.5:
                self.supply.finish_copy(identity)
        for sequence in self.scheduler.waiting:
            for name, _ in sequence.request.adapters:
                if chance is None or chance.random() < 0.5:
                    self.supply.read(str(name))

    def drain(self, chance: Random | None = None) -> int:
        """Step, with deliveries each time, until all have ended; returns the number of steps."""
        # Each alone would take about so many steps; preemption repeats some, which is why there is room for more.
        alone = sum(8 + len(s.tokens) + s.request.max_tokens for s in self.live)
        for num_steps in range(3 * alone + 1):
            if not self.live:
                self.deliver()
                self.check()
                return num_steps
            self.deliver(chance)
            self.step()
        raise AssertionError(f"no end in sight: {[s.request.request_id for s in self.live]}")

    def could_fit(self, sequence: Sequence, beside: Iterable[AdapterId] = ()) -> bool:
        """Whether the request and its adapters fit the pool with nothing else in it but the adapters `beside`."""
        request = sequence.request
        num_tokens = len(request.prompt) + request.max_tokens
        adapters = {content(str(name)) for name, _ in request.adapters}.union(beside)
        kv_pages = -(-num_tokens // self.memory.page_tokens)
        return kv_pages + sum(self.sizes[name] for name in adapters) <= self.memory.pool.num_pages

    def pin(self, name: str) -> None:
        if self.memory.adapters.pages(content(name)) is not None:
            self.memory.adapters.pin(content(name))
            self.pinned.add(content(name))

    def unpin_all(self) -> None:
        for identity in self.pinned:
            self.memory.adapters.unpin(identity)
        self.pinned.clear()

    def check_step(self, scheduled: list[Scheduled]) -> None:
        assert sum(s.num_new for s in scheduled) <= self.max_batch_tokens
        assert len({id(s.sequence) for s in scheduled}) == len(scheduled)
        for s in scheduled:
            sequence = s.sequence
            assert sequence in self.scheduler.running
            assert self.could_fit(sequence)
            assert 1 <= s.num_new <= sequence.num_pending
            assert sequence.block_table.capacity_tokens >= sequence.num_computed + s.num_new
            needed = {content(str(name)) for name, _ in sequence.request.adapters}
            assert {identity for identity, _ in sequence.mixture or ()} == needed == set(sequence.held)
            assert all(self.memory.adapters.is_ready(identity) for identity in needed)

    def check(self) -> None:
        scheduler, memory = self.scheduler, self.memory
        scheduler.check_integrity()
        assert len(scheduler.running) <= self.max_num_seqs
        assert {*map(id, scheduler.waiting), *map(id, scheduler.running)} == set(map(id, self.live))
        held = {page for sequence in scheduler.running for page in sequence.block_table.pages}
        assert memory.use.kv_in_use == len(held), "pages are held for nobody"
        if not self.live and not self.supply.copying and not self.pinned:
            assert memory.adapters.num_evictable_pages == memory.adapters.resident_pages
            assert memory.num_free + memory.num_evictable == memory.pool.num_pages
