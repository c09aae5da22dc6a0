"""In which order waiting sequences are admitted. A policy orders; what fits is the scheduler's business."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from manylora.errors import ManyLoraError
from manylora.text.sequence import Request, Sequence


@dataclass(frozen=True, slots=True)
class EngineView:
    """What a policy may know of the engine that it orders for."""

    max_batch_tokens: int
    max_num_seqs: int
    load_s: Callable[[Request], float]
    """Seconds that the adapters of a request take, by experience, from its coming on; 0 if they are in the pool."""


class Computed(Protocol):
    """What a step computed for a sequence."""

    @property
    def sequence(self) -> Sequence: ...

    @property
    def num_new(self) -> int: ...

    @property
    def samples(self) -> bool:
        """Whether a token was sampled."""
        ...


class Policy(ABC):
    """Passed to the engine, which calls `begin` once, then for each step `refuse`, `order` and `stepped`."""

    def begin(self, view: EngineView) -> None:  # noqa: B027  # most policies need nothing of it
        """Learn what engine this is."""

    def refuse(
        self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence], now: float
    ) -> Iterable[tuple[Sequence, ManyLoraError]]:
        """Return the waiting sequences that shall fail now, each with the reason.

        Args:
            now: seconds, on the clock of `Request.submitted_at`.
        """
        return ()

    def stepped(self, computed: SequenceOf[Computed], seconds: float) -> None:  # noqa: B027  # as `begin`
        """Learn what a step computed, and how long it took. The sequences do not have their new tokens yet."""

    @abstractmethod
    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        """Return the waiting sequences that may be admitted now, the first to be at the front. Called once a step.

        `waiting` is in order of arrival. With nothing running, something must be returned, or nothing ever runs.
        The order is taken one by one, so a generator sees what became of those before: a sequence that has started,
        or is about to, holds its adapters (`held`); one whose adapters are still being read holds none.
        """


class FirstComeFirstServed(Policy):
    """Admit in order of arrival. A preempted sequence is older than those that came after it, so it goes first."""

    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        return waiting


class AdapterClustering(Policy):
    """Keep at most `max_distinct` adapters running at a time, and admit first what uses those.

    Fewer distinct adapters in a step are fewer bytes to read (S-LoRA, Sheng et al. 2023, calls it adapter clustering).
    A sequence that so many later arrivals have overtaken goes first whatever it uses, so none waits for ever.
    """

    def __init__(self, max_distinct: int = 32, max_overtaken: int = 64) -> None:
        self.max_distinct = max_distinct
        self.max_overtaken = max_overtaken

    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        active = {key for sequence in running for key, _ in sequence.request.adapters}
        youngest = max((sequence.request.arrival for sequence in running), default=-1)

        def is_overdue(sequence: Sequence) -> bool:
            return youngest - sequence.request.arrival > self.max_overtaken

        for sequence in sorted(waiting, key=is_overdue, reverse=True):  # stable: by arrival among equals
            keys = {key for key, _ in sequence.request.adapters}
            # Where a large mixture or overdue ones exceed the bound already, what adds nothing to them may still come.
            bound = max(self.max_distinct, len(active))
            if is_overdue(sequence) or not active or len(active | keys) <= bound:
                yield sequence
                # One whose adapters are still being read keeps nobody out.
                if sequence.held:
                    active |= keys
