"""As many first tokens as possible by their deadlines; early word to those that cannot make it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from operator import attrgetter
from weakref import WeakSet

from manylora.errors import ConfigError, ManyLoraError, OverloadedError
from manylora.text.pace import Pace, retry_after_s
from manylora.text.policy import Computed, EngineView, Policy
from manylora.text.sequence import Request, Sequence

PLANNED_EACH_STEP = 128
"""Where more wait, a plan stands for so many steps that planning costs a step no more."""


class FirstTokenDeadline(Policy):
    """Admit by deadline those that can all make it; when not all can, set the longest aside, to be served last.

    Setting the longest aside whenever the next one would be late leaves as many in time as possible (Moore 1968,
    Hodgson: "An n job, one machine sequencing algorithm for minimizing the number of late jobs"). The time that a
    request takes is that of its tokens, prompt and max_tokens, at the pace of the last steps: whoever asks for fewer
    is served sooner. Refused is who would be late even if it were next. Who has begun is never set aside or refused.

    A request without a deadline is never refused, and has its turn as if it were due after `patience_s`.
    """

    def __init__(self, margin: float = 0.1, patience_s: float = 60.0) -> None:
        """
        Args:
            margin: share of its time by which a request is to be early, since all times are estimates.
        """
        if not 0 <= margin < 1:
            raise ConfigError(f"margin must be from 0 to below 1, got {margin}")
        if not patience_s > 0:
            raise ConfigError(f"patience_s must be above 0, got {patience_s}")
        self.margin = margin
        self.patience_s = patience_s
        self._pace = Pace()
        self._begun: WeakSet[Request] = WeakSet()  # any of whose samples has run
        self._entries: dict[Sequence, _Entry] = {}  # of all who waited when the last plan was made
        self._line: list[Sequence] = []  # of the last plan
        self._num_steps = inf  # since then

    def begin(self, view: EngineView) -> None:
        self._view = view

    def stepped(self, computed: SequenceOf[Computed], seconds: float) -> None:
        self._pace.add(sum(one.num_new for one in computed), seconds)
        self._begun.update(one.sequence.request for one in computed)

    def refuse(
        self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence], now: float
    ) -> Iterable[tuple[Sequence, ManyLoraError]]:
        if self._num_steps < len(waiting) // PLANNED_EACH_STEP:
            self._num_steps += 1
            return
        self._num_steps = 0
        prefill_s = self._prefill_times(len(running))
        ahead = sum(sequence.num_pending for sequence in running if sequence.in_prefill)
        self._entries = {
            sequence: self._entries.get(sequence) or self._entry(sequence) for sequence in waiting
        }
        begun: list[Sequence] = []
        inside: list[_Entry] = []
        late: dict[Sequence, float] = {}
        for sequence, entry in self._entries.items():
            if sequence.num_cached is not None or (entry.has_siblings and sequence.request in self._begun):
                begun.append(sequence)
                continue
            at = max(
                now + prefill_s(ahead + entry.num_prompt), entry.ready_at + prefill_s(entry.num_prompt)
            )
            if at > entry.deadline:
                late[sequence] = at - sequence.request.submitted_at
            else:
                inside.append(entry)
        begun_s = self._pace.token_s * sum(map(_num_tokens, begun))
        self._line = [*begun, *self._plan(inside, now + begun_s, prefill_s)]
        # When those in line have been served, if nobody else came.
        retry_s = retry_after_s(begun_s + self._pace.token_s * sum(entry.num_tokens for entry in inside))
        for sequence, first_token_s in late.items():
            yield (
                sequence,
                OverloadedError(
                    f"the first token would come {first_token_s:.1f} s after the request, beyond its deadline of "
                    f"{_given_s(sequence.request):g} s; ask again later, or with a longer deadline",
                    retry_after_s=retry_s,
                ),
            )

    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterable[Sequence]:
        in_line, still_waiting = set(self._line), set(waiting)
        others = [sequence for sequence in waiting if sequence not in in_line]
        return [
            # Who was preempted since the line was made goes first, who has come since then last.
            *(sequence for sequence in others if sequence.num_cached is not None),
            *(sequence for sequence in self._line if sequence in still_waiting),
            *(sequence for sequence in others if sequence.num_cached is None),
        ]

    def _plan(
        self, entries: list[_Entry], starts: float, prefill_s: Callable[[int], float]
    ) -> list[Sequence]:
        """Who is planned to be in time, by deadline; then who is set aside, the shortest first.

        Runs over all who wait, of whom overload makes hundreds, while nothing else can: hence the numbers kept in
        entries.
        """
        token_s = self._pace.token_s
        planned: dict[_Entry, None] = {}
        longest: list[tuple[int, int, _Entry]] = []  # a heap of those planned that may be set aside
        aside: list[_Entry] = []
        for place, entry in enumerate(sorted(entries, key=_due)):
            planned[entry] = None
            if entry.has_deadline:
                heappush(longest, (-entry.num_tokens, place, entry))
                if starts + prefill_s(entry.num_prompt) > entry.due:
                    minus_tokens, _, removed = heappop(longest)
                    starts += minus_tokens * token_s
                    del planned[removed]
                    aside.append(removed)
            starts += entry.num_tokens * token_s
        return [entry.sequence for entry in (*planned, *sorted(aside, key=_length))]

    def _entry(self, sequence: Sequence) -> _Entry:
        request = sequence.request
        deadline, due = inf, request.submitted_at + self.patience_s
        if request.deadline is not None:
            deadline, due = request.deadline, request.deadline - self.margin * _given_s(request)
        return _Entry(
            sequence=sequence,
            has_siblings=request.params.n > 1,
            num_prompt=sequence.num_prompt,
            num_tokens=_num_tokens(sequence),
            has_deadline=request.deadline is not None,
            deadline=deadline,
            due=due,
            ready_at=request.submitted_at + self._view.load_s(request),
        )

    def _prefill_times(self, num_running: int) -> Callable[[int], float]:
        """Return how long it takes to compute so many tokens of prompts beside the decodes of those that run."""
        most = self._view.max_batch_tokens
        num_decodes = min(num_running, most - 1)
        room, full_s = most - num_decodes, self._pace.step_s(most)
        none_s = self._pace.step_s(num_decodes)
        per_token_s = self._pace.step_s(num_decodes + 1) - none_s

        def prefill_s(num_tokens: int) -> float:
            num_full, num_rest = divmod(num_tokens, room)
            return num_full * full_s + (none_s + per_token_s * num_rest if num_rest else 0.0)

        return prefill_s


@dataclass(frozen=True, eq=False, slots=True)
class _Entry:
    """What a plan needs of a sequence that has not begun; none of it changes while the sequence waits."""

    sequence: Sequence
    has_siblings: bool
    """Other samples of the same request: that one of them runs is to begin for all."""
    num_prompt: int
    num_tokens: int
    """Prompt and answer: how long it keeps others waiting, its share of the engine's time, in tokens."""
    has_deadline: bool
    deadline: float
    due: float
    """When the first token shall come, by the plan."""
    ready_at: float
    """When its adapters will be there, by what was known when it came."""


_due, _length = attrgetter("due"), attrgetter("num_tokens")


def _num_tokens(sequence: Sequence) -> int:
    """Tokens that are still to be computed for a sequence, those of its answer included."""
    return sequence.num_pending + sequence.request.max_tokens - (len(sequence.tokens) - sequence.num_prompt)


def _given_s(request: Request) -> float:
    """The time that a request with a deadline gives."""
    assert request.deadline is not None
    return request.deadline - request.submitted_at
