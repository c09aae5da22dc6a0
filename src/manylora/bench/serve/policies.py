"""Two orders of admission to compare with; no server should want them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from manylora.errors import ManyLoraError, OverloadedError
from manylora.text.policy import Computed, EngineView, Policy
from manylora.text.sequence import Sequence

MARGIN_S = 0.5
"""A request is dropped when so little is left of its time."""

NEWEST_WEIGHT = 0.7
"""Of the newest count in the averages that say whether more requests come than are served."""


class LastInFirstOut(Policy):
    """Admit the newest first; refuse nobody."""

    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        return reversed(waiting)


class EarlyAbort(Policy):
    """Drop what is about to miss its deadline; admit the newest first while more come than are served.

    Both are moving averages, of how many came since anybody was admitted, and of how many were admitted at a time, cut
    to whole numbers as in the original. Who is dropped has come all the same, so it counts. While every place is taken
    nothing is counted and nobody is dropped.

    Source:
        S-LoRA (Sheng et al. 2023), slora/server/router/abort_req_queue.py. There new requests are admitted every tenth
        decode at most; here in every step, as under the other policies.
    """

    def __init__(self) -> None:
        self._num_coming, self._num_admitted = 1, 1
        self._waiting: set[Sequence] = set()  # when the step began, less who was dropped
        self._num_left = 0  # who still waited after the last admission

    def begin(self, view: EngineView) -> None:
        self._max_num_seqs = view.max_num_seqs

    def refuse(
        self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence], now: float
    ) -> Iterable[tuple[Sequence, ManyLoraError]]:
        if len(running) >= self._max_num_seqs:
            return
        self._num_coming = _average(len(waiting) - self._num_left, self._num_coming)
        for sequence in waiting:
            deadline = sequence.request.deadline
            # One that was preempted has been answered in part.
            if sequence.num_cached is None and deadline is not None and now + MARGIN_S >= deadline:
                yield sequence, OverloadedError("the first token would come too late", retry_after_s=1.0)

    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        self._waiting = set(waiting)
        return reversed(waiting) if self._num_coming >= self._num_admitted else waiting

    def stepped(self, computed: SequenceOf[Computed], seconds: float) -> None:
        num_admitted = sum(one.sequence in self._waiting for one in computed)
        if num_admitted:
            self._num_admitted = max(1, _average(num_admitted, self._num_admitted))
            self._num_left = len(self._waiting) - num_admitted


def _average(newest: int, before: int) -> int:
    return int(NEWEST_WEIGHT * newest + (1 - NEWEST_WEIGHT) * before)
