"""Requests go in as others end, and come out under their own numbers."""

import pytest

from manylora.bench.peers.loop import answer_all, by_mixture
from manylora.bench.text.timeline import Timeline
from manylora.bench.text.workload import TraceRequest


class Counter:
    """Answers with the request's first token plus 1, 2, 3 ..; its own number of tokens at a step."""

    def __init__(self, tokens_per_step: int = 1) -> None:
        self.tokens_per_step = tokens_per_step
        self.open: dict[int, list[int]] = {}
        self.most_open = 0
        self.added: list[int] = []

    def add(self, number, request, output_tokens):
        self.open[number] = [request.prompt[0] + i for i in range(1, output_tokens + 1)]
        self.added.append(number)
        self.most_open = max(self.most_open, len(self.open))

    def step(self):
        for number, left in list(self.open.items()):
            given, self.open[number] = left[: self.tokens_per_step], left[self.tokens_per_step :]
            if not self.open[number]:
                del self.open[number]
            yield number, given


def answer(engine, numbers, *, batch, output_tokens=3, size=9):
    requests = [(number, TraceRequest((100 * number,))) for number in numbers]
    outputs: list[list[int]] = [[] for _ in range(size)]
    timeline = Timeline(size)
    answer_all(
        engine, requests, batch=batch, output_tokens=output_tokens, timeline=timeline, outputs=outputs
    )
    return outputs


@pytest.mark.parametrize("tokens_per_step", [1, 2, 5])
def test_everybody_gets_their_own_tokens_and_no_more_than_batch_are_open(tokens_per_step):
    engine = Counter(tokens_per_step)
    outputs = answer(engine, [4, 0, 7, 2, 8], batch=2)
    assert engine.added == [4, 0, 7, 2, 8]
    assert engine.most_open == 2
    for number in (4, 0, 7, 2, 8):
        assert outputs[number] == [100 * number + i for i in (1, 2, 3)]
    assert outputs[1] == []


def test_all_are_open_where_the_batch_allows():
    engine = Counter()
    answer(engine, range(5), batch=9)
    assert engine.most_open == 5


def test_a_peer_that_answers_with_too_much_is_found_out():
    class Generous(Counter):
        def add(self, number, request, output_tokens):
            super().add(number, request, output_tokens + 1)

    with pytest.raises(RuntimeError, match="request 3 was to get 2 tokens, got 3"):
        answer(Generous(3), [3], batch=1, output_tokens=2)


def test_requests_of_a_mixture_stand_together_and_keep_their_numbers():
    a, b = ((1, 1.0),), ((1, 0.5), (2, 0.5))
    requests = [TraceRequest((i,), mixture) for i, mixture in enumerate([b, a, (), a, b])]
    groups = list(by_mixture(requests))
    assert [[number for number, _ in group] for group in groups] == [[2], [0, 4], [1, 3]]
    assert all(len({request.mixture for _, request in group}) == 1 for group in groups)
