"""Questions to somebody who may never answer: waited for only so long, and few of them pile up. Knows no question."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Any, TypeVar

from manylora.lora.aside import aside

T = TypeVar("T")

MAX_LATE = 8
"""Questions without an answer in time, still unanswered, from which on others are not even asked."""


class Patience:
    """Any thread may ask."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._late: set[Future[Any]] = set()
        self._try_at = 0.0  # when the next one may find out whether there are answers again

    def ask(self, question: Callable[[], T]) -> T:
        """Return the answer, or raise what the question raises.

        Raises:
            TimeoutError: there is none in time; at once, where so many are waited for already.
        """
        with self._lock:
            if len(self._late) >= MAX_LATE:
                now = monotonic()
                if now < self._try_at:
                    raise TimeoutError
                self._try_at = now + 2 * self.timeout_s  # while one is asked, and as long again
        asked = aside(question)
        try:
            answer = asked.result(self.timeout_s)
        except TimeoutError:
            self._late.add(asked)
            asked.add_done_callback(self._late.discard)
            raise
        self._late.clear()  # what still hangs does so on a connection of before
        return answer
