"""Kept rows: one JSON line per measurement, in a file per day and machine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from manylora.bench.machine import describe_revision
from manylora.bench.report import json_line
from manylora.bench.result import BenchResult


class Settings(Protocol):
    @property
    def record(self) -> bool | None: ...


class Result(Protocol):
    """What decides whether a measurement is kept."""

    @property
    def config(self) -> Settings: ...
    @property
    def dirty(self) -> bool: ...
    @property
    def forced(self) -> bool: ...


def records_folder() -> Path | None:
    """benchmarks/records of the repository that this code runs from; None if it runs from no repository."""
    root = describe_revision().root
    return None if root is None else root / "benchmarks" / "records"


def should_record(result: Result) -> bool:
    """What the user said; otherwise a row is kept if its commit can be told and nobody disturbed it."""
    if result.config.record is not None:
        return result.config.record
    return not result.dirty and not result.forced


def append_record(result: BenchResult, folder: Path) -> Path:
    """Append the row to <date>_<machine>.jsonl; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{result.started[:10]}_{result.machine.slug}.jsonl"
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json_line(result) + "\n")
    return file
