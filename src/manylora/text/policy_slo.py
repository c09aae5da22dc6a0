"""As many first tokens as possible by their deadlines; early word to those that cannot make it."""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from heapq import heappop, heappush
from weakref import WeakSet

from manylora.errors import ConfigError, ManyLoraError, OverloadedError
from manylora.text.pace import Pace, retry_after_s
from manylora.text.policy import Computed, EngineView, Policy
from manylora.text.sequence import Request, Sequence


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
        self._num_running = 0
        self._places: dict[Sequence, int] = {}  # in the line of this step

    def begin(self, view: EngineView) -> None:
        self._view = view

    def stepped(self, computed: SequenceOf[Computed], seconds: float) -> None:
        self._pace.add(sum(one.num_new for one in computed), seconds)
        self._begun.update(one.sequence.request for one in computed)

    def refuse(
        self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence], now: float
    ) -> Iterable[tuple[Sequence, ManyLoraError]]:
        self._num_running = len(running)
        num_ahead = sum(sequence.num_pending for sequence in running if sequence.in_prefill)
        late: dict[Sequence, float] = {}
        for sequence in waiting:
            deadline = sequence.request.deadline
            if deadline is not None and sequence.request not in self._begun:
                at = self._earliest(sequence.request, num_ahead, now)
                if at > deadline:
                    late[sequence] = at - sequence.request.submitted_at
        line = self._line([sequence for sequence in waiting if sequence not in late], now)
        self._places = {sequence: place for place, sequence in enumerate(line)}
        # When those in line have been served, if nobody else came.
        retry_s = retry_after_s(sum(map(self._service_s, line)))
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
        # Who was preempted since the line was made goes first.
        return sorted(waiting, key=lambda sequence: self._places.get(sequence, -1))

    def _line(self, waiting: SequenceOf[Sequence], now: float) -> list[Sequence]:
        """Who has begun; who is planned to be in time, by deadline; who is set aside, the shortest first."""
        begun = [sequence for sequence in waiting if sequence.request in self._begun]
        others = [sequence for sequence in waiting if sequence.request not in self._begun]
        planned: dict[Sequence, None] = {}
        longest: list[tuple[float, int, Sequence]] = []  # a heap of those planned that may be set aside
        aside: list[Sequence] = []
        starts = now + sum(map(self._service_s, begun))
        for number, sequence in enumerate(sorted(others, key=self._due)):
            planned[sequence] = None
            service_s = self._service_s(sequence)
            starts += service_s
            if sequence.request.deadline is None:
                continue
            heappush(longest, (-service_s, number, sequence))
            if starts - service_s + self._prefill_s(sequence.num_prompt) > self._due(sequence):
                minus_service_s, _, removed = heappop(longest)
                starts += minus_service_s
                del planned[removed]
                aside.append(removed)
        return [*begun, *planned, *sorted(aside, key=self._service_s)]

    def _due(self, sequence: Sequence) -> float:
        """When the first token shall come, by the plan."""
        request = sequence.request
        if request.deadline is None:
            return request.submitted_at + self.patience_s
        return request.deadline - self.margin * _given_s(request)

    def _service_s(self, sequence: Sequence) -> float:
        """How long a sequence keeps others waiting: its share of the engine's time, in which others are served too."""
        num_tokens = (
            sequence.num_pending
            + sequence.request.max_tokens
            - (len(sequence.tokens) - sequence.num_prompt)
        )
        return num_tokens * self._pace.token_s

    def _earliest(self, request: Request, num_ahead: int, now: float) -> float:
        """When the first token would come if the request were next, behind `num_ahead` tokens of prompts."""
        ready_at = request.submitted_at + self._view.load_s(request)
        prefill_s = self._prefill_s(len(request.prompt))
        return max(now + self._prefill_s(num_ahead + len(request.prompt)), ready_at + prefill_s)

    def _prefill_s(self, num_tokens: int) -> float:
        """How long it takes to compute so many tokens of prompts beside the decodes of those that run."""
        num_decodes = min(self._num_running, self._view.max_batch_tokens - 1)
        num_full, num_rest = divmod(num_tokens, self._view.max_batch_tokens - num_decodes)
        rest_s = self._pace.step_s(num_decodes + num_rest) if num_rest else 0.0
        return num_full * self._pace.step_s(self._view.max_batch_tokens) + rest_s


def _given_s(request: Request) -> float:
    """The time that a request with a deadline gives."""
    assert request.deadline is not None
    return request.deadline - request.submitted_at
