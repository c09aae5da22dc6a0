"""What `manylora bench steps` does from its settings to its last line."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from manylora.bench.progress import progress_lines
from manylora.bench.records import folder_for, keep_and_print
from manylora.bench.settings import settings_digest
from manylora.bench.steps.config import StepsConfig
from manylora.bench.steps.result import StepsResult, print_result
from manylora.bench.steps.run import run


def bench_steps(config: StepsConfig) -> None:
    """Measure, print the tables (unless `json`), keep the record, and print it as the last line.

    Raises:
        ConfigError: the machine is busy; or the record shall be kept and there is no repository to keep it in.
    """
    folder = folder_for(config)
    result = run(config, progress_lines(Console(stderr=True)))
    if not config.json:
        print_result(result)
    keep_and_print(result, None if folder is None else record_file(result, folder))


def record_file(result: StepsResult, folder: Path) -> Path:
    """Where a record is kept: one of equal settings a day and machine, the newest."""
    kind = f"steps-{result.config.dtype}-{settings_digest(result.config)}"
    return folder / f"{result.started[:10]}_{result.machine.slug}_{kind}.json"
