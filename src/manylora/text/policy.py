"""In which order waiting sequences are admitted. A policy orders; what fits is the scheduler's business."""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from manylora.text.sequence import Sequence


class Policy(Protocol):
    """Passed to the engine; any object with this method will do."""

    def order(self, waiting: SequenceOf[Sequence], running: Iterable[Sequence]) -> SequenceOf[Sequence]:
        """Return the waiting sequences that may be admitted now, the first to be at the front. Called once a step.

        `waiting` is in order of arrival. With nothing running, something must be returned, or nothing ever runs.
        """
        ...


class FirstComeFirstServed:
    """Admit in order of arrival. A preempted sequence is older than those that came after it, so it goes first."""

    def order(self, waiting: SequenceOf[Sequence], running: Iterable[Sequence]) -> SequenceOf[Sequence]:
        return waiting


class AdapterClustering:
    """Keep at most `max_distinct` adapters running at a time, and admit first what uses those.

    Fewer distinct adapters in a step are fewer bytes to read (S-LoRA, Sheng et al. 2023, calls it adapter clustering).
    A sequence that so many later arrivals have overtaken goes first whatever it uses, so none waits for ever.
    """

    def __init__(self, max_distinct: int = 32, max_overtaken: int = 64) -> None:
        self.max_distinct = max_distinct
        self.max_overtaken = max_overtaken

    def order(self, waiting: SequenceOf[Sequence], running: Iterable[Sequence]) -> SequenceOf[Sequence]:
        active = {key for sequence in running for key, _ in sequence.request.adapters}
        youngest = max((sequence.request.arrival for sequence in running), default=-1)
        overdue: list[Sequence] = []
        admitted: list[Sequence] = []
        for sequence in waiting:
            keys = {key for key, _ in sequence.request.adapters}
            if youngest - sequence.request.arrival > self.max_overtaken:
                overdue.append(sequence)
            elif not active or len(active | keys) <= self.max_distinct:
                admitted.append(sequence)
            else:
                continue
            active |= keys
        return overdue + admitted
