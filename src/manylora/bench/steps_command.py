"""What `manylora bench steps` does from its settings to its last line."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from manylora.bench.command import progress_lines
from manylora.bench.records import records_folder, should_record
from manylora.bench.steps import run
from manylora.bench.steps_config import StepsConfig
from manylora.bench.steps_result import StepsResult, print_result
from manylora.errors import ConfigError
from manylora.training.aside import write_text_aside


def bench_steps(config: StepsConfig) -> None:
    """Measure, print the tables (unless `json`), keep the record, and print it as the last line.

    Raises:
        ConfigError: the machine is busy; or the record shall be kept and there is no repository to keep it in.
    """
    folder = records_folder()
    if config.record and folder is None:
        raise ConfigError(
            "a record can only be kept by code that runs from its repository; leave out --record"
        )
    result = run(config, progress_lines(Console(stderr=True)))
    if not config.json:
        print_result(result)
    if folder is not None and should_record(result):
        write_text_aside(record_file(result, folder), json.dumps(result.to_json(), indent=1) + "\n")
    print(json.dumps(result.to_json(), separators=(",", ":")))


def record_file(result: StepsResult, folder: Path) -> Path:
    """Where a record is kept: one a day, machine and dtype, the newest."""
    return folder / f"{result.started[:10]}_{result.machine.slug}_steps-{result.config.dtype}.json"
