"""How a measurement says what it is at."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console


def progress_lines(console: Console) -> Callable[[str], None]:
    """A line for each stage, with the seconds since the command began."""
    began = time.perf_counter()

    def tell(what: str) -> None:
        seconds = time.perf_counter() - began
        console.print(f"{seconds:5.0f} s  {what}", markup=False, highlight=False, soft_wrap=True)

    return tell
