"""What `manylora bench text` does from its settings to its last line."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from manylora.bench.config import BenchConfig
from manylora.bench.records import append_record, folder_for, should_record
from manylora.bench.report import json_line, print_result
from manylora.bench.text import run


def bench_text(config: BenchConfig) -> None:
    """Measure, print the table (unless `json`), keep the row, and print it as the last line.

    Raises:
        ConfigError: the machine is busy; or the row shall be kept and there is no repository to keep it in.
    """
    folder = folder_for(config)
    result = run(config, progress_lines(Console(stderr=True)))
    if not config.json:
        print_result(result)
    if folder is not None and should_record(result):
        append_record(result, folder)
    print(json_line(result))


def progress_lines(console: Console) -> Callable[[str], None]:
    """A line for each stage, with the seconds since the command began."""
    began = time.perf_counter()

    def tell(what: str) -> None:
        seconds = time.perf_counter() - began
        console.print(f"{seconds:5.0f} s  {what}", markup=False, highlight=False, soft_wrap=True)

    return tell
