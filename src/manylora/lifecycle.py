"""The states of a request and its one terminal event. Shared by text and images; knows no tokens, no pages.

    waiting <-> running -> finished (stop or length)
       |           |
       +-----------+-----> cancelled, failed

A running request goes back to waiting when it is preempted. A request ends once: nothing leaves the last
three states.
"""

from dataclasses import dataclass
from enum import StrEnum


class RequestState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class FinishReason(StrEnum):
    STOP = "stop"
    """The model ended by itself, or a stop string came."""
    LENGTH = "length"
    """The allowed length is used up."""


@dataclass(frozen=True, slots=True)
class TerminalEvent:
    """How a request ended. The reason belongs to `finished` alone, the error to `failed` alone."""

    state: RequestState
    reason: FinishReason | None = None
    error: Exception | None = None


_NEXT = {
    RequestState.WAITING: {RequestState.RUNNING, RequestState.CANCELLED, RequestState.FAILED},
    RequestState.RUNNING: {
        RequestState.WAITING,
        RequestState.FINISHED,
        RequestState.CANCELLED,
        RequestState.FAILED,
    },
}


class Lifecycle:
    """Where one request stands. A transition that the drawing above lacks is our own bug: an assertion."""

    def __init__(self) -> None:
        self._state = RequestState.WAITING
        self._terminal: TerminalEvent | None = None

    @property
    def state(self) -> RequestState:
        return self._state

    @property
    def terminal(self) -> TerminalEvent | None:
        """How the request ended; None as long as it has not."""
        return self._terminal

    def start(self) -> None:
        self._move(RequestState.RUNNING)

    def preempt(self) -> None:
        self._move(RequestState.WAITING)

    def finish(self, reason: FinishReason) -> TerminalEvent:
        return self._end(TerminalEvent(RequestState.FINISHED, reason=reason))

    def cancel(self) -> TerminalEvent:
        return self._end(TerminalEvent(RequestState.CANCELLED))

    def fail(self, error: Exception) -> TerminalEvent:
        return self._end(TerminalEvent(RequestState.FAILED, error=error))

    def _end(self, event: TerminalEvent) -> TerminalEvent:
        self._move(event.state)
        self._terminal = event
        return event

    def _move(self, to: RequestState) -> None:
        assert to in _NEXT.get(self._state, ()), f"a request cannot go from {self._state} to {to}"
        self._state = to
