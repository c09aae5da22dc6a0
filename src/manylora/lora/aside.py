"""Work that may hang, on a thread of its own that nobody has to wait for, not even the end of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def aside(work: Callable[[], T]) -> Future[T]:
    """Begin some work; the future has its result or its error."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # nobody can take it back

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whatever it was, who waits must hear of it
            future.set_exception(error)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return future
