"""In which order waiting sequences are admitted. A policy orders; what fits is the scheduler's business."""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from manylora.text.sequence import Sequence


class Policy(Protocol):
    """Passed to the engine; any object with this method will do."""

    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        """Return the waiting sequences that may be admitted now, the first to be at the front. Called once a step.

        `waiting` is in order of arrival. With nothing running, something must be returned, or nothing ever runs.
        The order is taken one by one, so a generator sees what became of those before: a sequence that has started,
        or is about to, holds its adapters (`held`); one whose adapters are still being read holds none.
        """
        ...


class FirstComeFirstServed:
    """Admit in order of arrival. A preempted sequence is older than those that came after it, so it goes first."""

    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        return waiting


class AdapterClustering:
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
