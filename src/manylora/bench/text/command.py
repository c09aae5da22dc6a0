"""What `manylora bench text` does from its settings to its last line."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from manylora.bench.progress import progress_lines
from manylora.bench.records import folder_for, should_record
from manylora.bench.text.config import BenchConfig
from manylora.bench.text.report import json_line, print_result
from manylora.bench.text.result import BenchResult
from manylora.bench.text.run import run


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


def append_record(result: BenchResult, folder: Path) -> Path:
    """Append the row to <date>_<machine>.jsonl; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{result.started[:10]}_{result.machine.slug}.jsonl"
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json_line(result) + "\n")
    return file
