"""A request ends once, and moves only along the drawing of lifecycle.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.lifecycle import FinishReason, Lifecycle, RequestState, TerminalEvent

ERROR = RuntimeError("out of luck")
MOVES = {
    "start": Lifecycle.start,
    "preempt": Lifecycle.preempt,
    "stop": lambda request: request.finish(FinishReason.STOP),
    "length": lambda request: request.finish(FinishReason.LENGTH),
    "cancel": Lifecycle.cancel,
    "fail": lambda request: request.fail(ERROR),
}
LEGAL = {
    ("waiting", "start"): "running",
    ("waiting", "cancel"): "cancelled",
    ("waiting", "fail"): "failed",
    ("running", "preempt"): "waiting",
    ("running", "stop"): "finished",
    ("running", "length"): "finished",
    ("running", "cancel"): "cancelled",
    ("running", "fail"): "failed",
}
EVENTS = {
    "stop": TerminalEvent(RequestState.FINISHED, reason=FinishReason.STOP),
    "length": TerminalEvent(RequestState.FINISHED, reason=FinishReason.LENGTH),
    "cancel": TerminalEvent(RequestState.CANCELLED),
    "fail": TerminalEvent(RequestState.FAILED, error=ERROR),
}


@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=12))
def test_a_request_moves_along_the_drawing_and_ends_once(moves):
    request, events = Lifecycle(), []
    state = "waiting"
    for move in moves:
        if (state, move) not in LEGAL:
            with pytest.raises(AssertionError, match=f"a request cannot go from {state} to"):
                MOVES[move](request)
        else:
            event = MOVES[move](request)
            events += [event] if event is not None else []
            assert event == EVENTS.get(move)
            state = LEGAL[state, move]
        assert request.state == state
    assert len(events) <= 1
    assert request.terminal == (events[0] if events else None)


def test_a_preempted_request_can_run_again():
    request = Lifecycle()
    request.start()
    request.preempt()
    request.start()
    assert request.finish(FinishReason.STOP) is request.terminal
