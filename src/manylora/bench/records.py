"""Which measurements are kept, and where: rows of text in a file a day and machine, others in files of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from manylora.bench.machine import describe_revision
from manylora.errors import ConfigError
from manylora.training.aside import write_text_aside


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


class JsonResult(Result, Protocol):
    """One that is a JSON object."""

    def to_json(self) -> dict[str, Any]: ...


def records_folder() -> Path | None:
    """benchmarks/records of the repository that this code runs from; None if it runs from no repository."""
    root = describe_revision().root
    return None if root is None else root / "benchmarks" / "records"


def folder_for(config: Settings) -> Path | None:
    """Return `records_folder()`; to be asked before measuring, which is long.

    Raises:
        ConfigError: the record shall be kept, and there is no repository to keep it in.
    """
    folder = records_folder()
    if config.record and folder is None:
        raise ConfigError(
            "a record can only be kept by code that runs from its repository; leave out --record"
        )
    return folder


def should_record(result: Result) -> bool:
    """What the user said; otherwise a row is kept if its commit can be told and nobody disturbed it."""
    if result.config.record is not None:
        return result.config.record
    return not result.dirty and not result.forced


def keep_and_print(result: JsonResult, file: Path | None) -> None:
    """Write a result to a file of its own, if there is one and it is to be kept, and print it as the last line."""
    if file is not None and should_record(result):
        write_text_aside(file, json.dumps(result.to_json(), indent=1) + "\n")
    print(json.dumps(result.to_json(), separators=(",", ":")))


def rounded(value: Any) -> Any:
    """Four digits are more than the noise leaves; dictionaries by string keys, as JSON has them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
