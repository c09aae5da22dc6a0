"""Which tokens of which sequences the next step computes, and who has the pages for them. No torch.

    engine.submit -> add -> [waiting] -> schedule -> [running] -> update -> finish
                               ^                         |
                               +------- preempt ---------+

Pages are given to running sequences first, oldest first; then waiting ones are admitted in the policy's order. When
pages run out, whoever came last gives up what it holds: a waiting sequence lets its adapters go; a running one is
preempted, that is, it loses its pages, keeps its tokens, and computes them again when it is admitted anew.
"""

import struct
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from manylora.errors import CapacityError, ManyLoraError
from manylora.lora.adapter import AdapterId
from manylora.memory.pages import PageId
from manylora.memory.unified import UnifiedMemory
from manylora.text.policy import EngineView, Policy
from manylora.text.sequence import AdapterKey, Request, Sequence


class AdapterSupply(Protocol):
    """Who brings adapters from the library to the pool, beside compute."""

    def lookup(self, key: AdapterKey) -> tuple[AdapterId, int] | None:
        """Identity and pages of an adapter that is resident, or read and ready to be; None while it is on its way."""
        ...

    def place(self, identity: AdapterId, pages: list[PageId]) -> None:
        """Make the adapter resident on these pages; it becomes ready some time later."""
        ...

    def prefer(self, requests: SequenceOf[Request]) -> None:
        """Learn whose adapters to read first: those who wait for some, in the order in which their turns come."""
        ...

    def load_s(self, request: Request) -> float:
        """Seconds that the adapters of a request take, by experience, from its coming on; 0 if all are ready."""
        ...


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence with the tokens that the step computes for it."""

    sequence: Sequence
    num_new: int

    @property
    def samples(self) -> bool:
        """Whether this brings the sequence to its end, so that a token is sampled."""
        return self.num_new == self.sequence.num_pending


class Scheduler:
    """Owns the queues and every decision about pages. One thread only."""

    def __init__(
        self,
        memory: UnifiedMemory,
        supply: AdapterSupply,
        policy: Policy,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: seconds, the same that requests carry as `submitted_at` and `deadline`."""
        self.memory = memory
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.num_preemptions = 0
        self.num_prefix_tokens = 0
        """Tokens whose KV an admitted sequence found in the prefix cache."""
        self._supply = supply
        self._policy = policy
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._clock = clock
        policy.begin(EngineView(max_batch_tokens, max_num_seqs, supply.load_s))
        self._rejected: list[tuple[Sequence, ManyLoraError]] = []

    def add(self, sequence: Sequence) -> None:
        _insert(self.waiting, sequence)

    def schedule(self) -> list[Scheduled]:
        """Decide the next step. Empty when nothing can run, for want of requests or of adapters still on their way."""
        for sequence, error in list(self._policy.refuse(self.waiting, self.running, self._clock())):
            self._reject(sequence, error)
        step: dict[int, Scheduled] = {}  # by id of the sequence
        budget = self._max_batch_tokens
        is_short = False
        # Decodes first: a long prompt must not hold up those who are already answering.
        for sequence in sorted(self.running, key=lambda s: s.in_prefill):
            num_new = min(sequence.num_pending, budget)
            if num_new == 0 or sequence not in self.running:
                continue
            num_preemptions = self.num_preemptions
            if self._grow(sequence, num_new, step):
                step[id(sequence)] = Scheduled(sequence, num_new)
                budget -= num_new
                if self.num_preemptions > num_preemptions:
                    budget = self._max_batch_tokens - sum(s.num_new for s in step.values())
            else:
                is_short = True
        # What those who run lack, nobody else may take.
        if not is_short:
            self._admit(step, budget)
        return list(step.values())

    def stepped(self, scheduled: SequenceOf[Scheduled], seconds: float) -> None:
        """Record that a step was computed, and how long it took; before its sequences are updated."""
        self._policy.stepped(scheduled, seconds)

    def update(self, scheduled: Scheduled, token: int | None) -> None:
        """Record that the step is done for a sequence, with the token sampled for it if one was due."""
        sequence = scheduled.sequence
        is_prompt = sequence.num_computed < sequence.num_prompt
        sequence.num_computed += scheduled.num_new
        if is_prompt:
            self._keep_prefix(sequence)  # shared from now on, while its first user still runs
        if token is not None:
            sequence.tokens.append(token)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is: it has finished, failed or been cancelled."""
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        self._release_pages(sequence)
        self._release_adapters(sequence)

    def take_rejected(self) -> list[tuple[Sequence, ManyLoraError]]:
        """Hand over the sequences that never fit, or that the policy refused; they have been taken out already."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def check_fits(self, num_tokens: int, adapter_pages: int = 0) -> None:
        """Raise CapacityError if tokens and adapters could not fit even if nobody else ran.

        Args:
            adapter_pages: of adapters that are not pinned; those that are stand in the pool already.
        """
        needed = -(-num_tokens // self.memory.page_tokens)
        total, pinned = self.memory.pool.num_pages, self.memory.adapters.num_pinned_pages
        if needed + adapter_pages > total - pinned:
            raise CapacityError(
                f"a request of up to {num_tokens} tokens (prompt and max_tokens) needs {needed} pages and its "
                f"adapters {adapter_pages}, but the whole pool has {total}"
                f"{f', {pinned} of them pinned' if pinned else ''}; "
                "ask for fewer tokens or adapters, or give the pool more memory"
            )

    def could_spare(self, identity: AdapterId, num_pages: int) -> bool:
        """Whether all that have begun to answer, each by itself, would still fit if this adapter's pages were never to
        be had. Those preempted count too."""
        adapters, total = self.memory.adapters, self.memory.pool.num_pages
        left = total - adapters.num_pinned_pages - num_pages

        def still_fits(sequence: Sequence) -> bool:
            others = (
                pages
                for one, pages in sequence.adapter_pages.items()
                if one != identity and not adapters.is_pinned(one)
            )
            num_tokens = sequence.num_prompt + sequence.request.max_tokens
            return -(-num_tokens // self.memory.page_tokens) + sum(others) <= left

        return all(map(still_fits, [*self.running, *(one for one in self.waiting if one.has_run)]))

    def check_integrity(self) -> None:
        """Assert that queues, pages and adapter references agree."""
        self.memory.check_integrity()
        assert not set(map(id, self.waiting)) & set(map(id, self.running))
        for sequence in self.waiting:
            assert not sequence.block_table.pages
            assert sequence.num_computed == 0
        for sequence in self.running:
            assert sequence.num_computed <= sequence.block_table.capacity_tokens
            assert all(self.memory.adapters.is_ready(identity) for identity in sequence.held)
        if not self.waiting and not self.running:
            assert self.memory.use.kv_in_use == 0, "pages are held though no sequence is left"

    # -- running sequences

    def _grow(self, sequence: Sequence, num_new: int, step: dict[int, Scheduled]) -> bool:
        """Give a running sequence pages for its new tokens; False if it must wait, or had to be preempted itself."""
        needed = sequence.block_table.pages_needed(sequence.num_computed + num_new)
        while not self.memory.can_alloc(needed):
            holders = self._holders()
            youngest = max(holders, key=_age)
            if holders == [sequence]:
                # By itself it fits, so what it lacks is being copied to, and can be evicted once that is done.
                return False
            if youngest in self.waiting:
                self._release_adapters(youngest)
                continue
            step.pop(id(youngest), None)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.block_table.grow(self.memory.alloc(needed))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release_pages(sequence)
        sequence.lifecycle.preempt()
        _insert(self.waiting, sequence)

    def _holders(self) -> list[Sequence]:
        """All who hold pages or adapters."""
        return [*self.running, *(sequence for sequence in self.waiting if sequence.held)]

    # -- waiting sequences

    def _admit(self, step: dict[int, Scheduled], budget: int) -> None:
        """Start waiting sequences, and place the adapters of those who come next.

        Whoever waits for memory stops those behind it, or it might wait for ever; whoever waits for an adapter to be
        read stops nobody.
        """
        next_up: list[Sequence] = []
        lacking: dict[Request, None] = {}
        growth: int | None = None
        for sequence in self._policy.order(list(self.waiting), self.running):
            lacking[sequence.request] = None
            needs = self._identify(sequence)
            if needs is None:
                continue
            # Not the whole queue: so many could start if all before them finished now.
            if len(next_up) == 2 * self._max_num_seqs:
                break
            next_up.append(sequence)
            none_starts = budget == 0 or len(self.running) == self._max_num_seqs
            if none_starts:
                # What is placed ahead and thrown away again for those that run would have to be read once more.
                growth = self._growth() if growth is None else growth
                if not self.memory.can_alloc(self._num_absent_pages(needs) + growth):
                    break
            if not self._hold(sequence, needs):
                if not self._let_go_of_all_but(next_up) or not self._hold(sequence, needs):
                    break
            lacking.pop(sequence.request, None)
            if not all(self.memory.adapters.is_ready(identity) for identity in sequence.held):
                continue
            if none_starts or self._awaits_sibling(sequence):
                continue
            if not self._start(sequence):
                if not self._let_go_of_all_but(next_up) or not self._start(sequence):
                    break
            num_new = min(sequence.num_pending, budget)
            step[id(sequence)] = Scheduled(sequence, num_new)
            budget -= num_new
        self._supply.prefer(list(lacking))

    def _identify(self, sequence: Sequence) -> dict[AdapterId, int] | None:
        """Return the adapters that a sequence needs, by content, with the pages each takes.

        None while one is still being read, or if they can never fit: then the sequence has been taken out.
        """
        found = [self._supply.lookup(key) for key, _ in sequence.request.adapters]
        needs = dict(entry for entry in found if entry is not None)
        weights: dict[AdapterId, float] = {}
        for entry, (_, weight) in zip(found, sequence.request.adapters, strict=True):
            if entry is None:
                return None
            # Two names may point at the same content.
            weights[entry[0]] = weights.get(entry[0], 0.0) + weight
        sequence.mixture = tuple(sorted(weights.items()))
        sequence.adapter_pages = needs
        try:
            is_pinned = self.memory.adapters.is_pinned
            adapter_pages = sum(pages for identity, pages in needs.items() if not is_pinned(identity))
            self.check_fits(sequence.num_prompt + sequence.request.max_tokens, adapter_pages)
        except CapacityError as error:
            self._reject(sequence, error)
            return None
        return needs

    def _growth(self) -> int:
        """Pages that running sequences may still come to need."""
        page_tokens = self.memory.page_tokens
        return sum(
            -(-(one.num_prompt + one.request.max_tokens) // page_tokens) - len(one.block_table.pages)
            for one in self.running
        )

    def _num_absent_pages(self, needs: dict[AdapterId, int]) -> int:
        return sum(num for identity, num in needs.items() if self.memory.adapters.pages(identity) is None)

    def _hold(self, sequence: Sequence, needs: dict[AdapterId, int]) -> bool:
        """Make sure that the adapters are resident, or becoming so, and stay; False if one does not fit now."""
        adapters = self.memory.adapters
        wanted = [identity for identity in needs if identity not in sequence.held]
        absent = [identity for identity in wanted if adapters.pages(identity) is None]
        # Those that are there first, so that placing the others cannot evict them.
        for identity in sorted(wanted, key=absent.__contains__):
            if identity in absent:
                if not self.memory.can_alloc(needs[identity]):
                    return False
                self._supply.place(identity, self.memory.alloc(needs[identity]))
            adapters.acquire(identity)
            sequence.held.append(identity)
        return True

    def _let_go_of_all_but(self, next_up: list[Sequence]) -> bool:
        """Release what waiting sequences hold whose turn comes later; False if none of them held anything.

        Those before in line keep what they hold: it is all they need, so they are about to start. If each could take
        from the other what has just been copied for it, neither would.
        """
        holders = [sequence for sequence in self.waiting if sequence.held and sequence not in next_up]
        for sequence in holders:
            self._release_adapters(sequence)
        return bool(holders)

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Whether another sample of the same request is computing pages of the prompt that this one can share."""
        page_tokens = self.memory.page_tokens
        num_shareable = (sequence.num_prompt - 1) // page_tokens * page_tokens
        return self.memory.prefixes.enabled and any(
            other.request is sequence.request and other.num_computed < num_shareable
            for other in self.running
        )

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence pages for all its tokens and move it to running; False if they do not fit."""
        cached = self.memory.prefixes.match(sequence.tokens, _salt(sequence))
        needed = -(-len(sequence.tokens) // self.memory.page_tokens) - len(cached)
        if not self.memory.can_alloc(needed):
            self.memory.pool.free(cached)
            return False
        sequence.block_table.grow([*cached, *self.memory.alloc(needed)])
        sequence.num_computed = len(cached) * self.memory.page_tokens
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        self.num_prefix_tokens += sequence.num_computed
        self.waiting.remove(sequence)
        _insert(self.running, sequence)
        sequence.lifecycle.start()
        return True

    # -- letting go

    def _reject(self, sequence: Sequence, error: ManyLoraError) -> None:
        self.remove(sequence)
        self._rejected.append((sequence, error))

    def _release_pages(self, sequence: Sequence) -> None:
        if sequence.block_table.pages:
            self._keep_prefix(sequence)
            self.memory.pool.free(sequence.block_table.release())
        sequence.num_computed = 0

    def _release_adapters(self, sequence: Sequence) -> None:
        for identity in sequence.held:
            self.memory.adapters.release(identity)
        sequence.held.clear()

    def _keep_prefix(self, sequence: Sequence) -> None:
        computed = sequence.tokens[: sequence.num_computed]
        self.memory.prefixes.insert(computed, sequence.block_table.pages, _salt(sequence))


def _insert(queue: list[Sequence], sequence: Sequence) -> None:
    """Insert by arrival. Searched from the end, since most sequences are younger than all others."""
    place = len(queue)
    while place > 0 and _age(queue[place - 1]) > _age(sequence):
        place -= 1
    queue.insert(place, sequence)


def _age(sequence: Sequence) -> tuple[int, int]:
    """Smaller is older."""
    return sequence.request.arrival, sequence.index


def _salt(sequence: Sequence) -> bytes:
    """Identity of who may share the KV of a sequence with equal tokens."""
    assert sequence.mixture is not None, "a sequence ran before its adapters were known"
    return prefix_salt(sequence.request.tenant, sequence.mixture)


def prefix_salt(tenant: str, mixture: Iterable[tuple[AdapterId, float]]) -> bytes:
    """Equal for one tenant and equal mixtures, by contents and weights, whatever the adapters are called.

    KV depends on the mixture alone; but who finds a prompt's KV in the cache is answered sooner, and so learns that
    somebody asked the same: no tenant shall learn that of another.
    """
    packed = b"".join(identity.encode() + struct.pack("<d", weight) for identity, weight in mixture)
    name = tenant.encode("utf-8", "surrogatepass")
    # The length first, so that no tenant's name can be read as the beginning of a mixture.
    return blake2b(struct.pack("<q", len(name)) + name + packed, digest_size=16).digest()
