"""What `manylora bench serve` does from its settings to its last line."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from rich.console import Console

from manylora.bench.progress import progress_lines
from manylora.bench.records import folder_for, should_record
from manylora.bench.serve.config import ServeBenchConfig
from manylora.bench.serve.journal import finish
from manylora.bench.serve.plots import plot_all
from manylora.bench.serve.report import json_line, print_result
from manylora.bench.serve.result import ServeResult, settings_digest
from manylora.bench.serve.run import Measured, measure
from manylora.training.aside import write_text_aside


def bench_serve(config: ServeBenchConfig) -> None:
    """Measure, print the tables (unless `json`), keep the record, and print it as the last line.

    Raises:
        ConfigError: the machine is busy; or the record shall be kept and there is no repository to keep it in.
    """
    folder = folder_for(config)
    measured = measure(config, progress_lines(Console(stderr=True)))
    if not config.json:
        print_result(measured.result)
    if config.out is not None:
        _write(measured, config.out)
    if folder is not None and should_record(measured.result):
        write_text_aside(record_file(measured.result, folder), _indented(measured.result))
    if config.out is not None:
        finish(config.out)  # all that it held is kept by now
    print(json_line(measured.result))


def record_file(result: ServeResult, folder: Path) -> Path:
    """Where a record is kept: one of equal settings a day and machine, the newest."""
    config = result.config
    name = f"{result.started[:10]}_{result.machine.slug}_serve-{result.kind}-{config.num_adapters}"
    return folder / f"{name}-{settings_digest(config)}.json"


def _write(measured: Measured, folder: Path) -> None:
    write_text_aside(folder / "result.json", _indented(measured.result))
    lines = [
        msgspec.json.encode({"run": number, **msgspec.to_builtins(outcome)}).decode()
        for number, outcomes in enumerate(measured.outcomes)
        for outcome in outcomes
    ]
    write_text_aside(folder / "outcomes.jsonl", "\n".join(lines) + "\n")
    plot_all(measured, folder)


def _indented(result: ServeResult) -> str:
    return json.dumps(result.to_json(), indent=1) + "\n"
