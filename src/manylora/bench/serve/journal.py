"""Runs as they are measured, kept one by one, so that a measurement that was interrupted goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from manylora.bench.serve.job import Outcome
from manylora.bench.serve.result import ServeRow, ServeRun
from manylora.errors import ConfigError

JOURNAL_FILE = "unfinished.jsonl"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a journal is of: its first line. The commit is no part of it; each row says its own."""

    settings: Mapping[str, Any]
    machine: str


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the closed loop found: the rates of all runs follow from it, so it is measured once."""

    per_s: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A run."""

    row: ServeRow
    outcomes: tuple[Outcome, ...]


class Journal:
    """What has been measured so far; without a folder, for as long as the process lives.

    Each entry is one line, written whole or not at all as far as readers are concerned: a last line that a kill cut off
    is dropped.
    """

    def __init__(self, folder: Path | None, measurement: Measurement) -> None:
        """
        Raises:
            ConfigError: the folder has an unfinished measurement of another kind; says what differs.
        """
        self.capacity_per_s: float | None = None
        self._kept: dict[ServeRun, Kept] = {}
        self._file = None if folder is None else folder / JOURNAL_FILE
        if self._file is not None and self._file.exists():
            self._read(self._file, measurement)
        elif self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._write("of", measurement)

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, run: ServeRun) -> Kept | None:
        return self._kept.get(run)

    def keep_capacity(self, per_s: float) -> None:
        self.capacity_per_s = per_s
        self._write("capacity", Capacity(per_s=per_s))

    def keep(self, kept: Kept) -> None:
        self._kept[kept.row.run] = kept
        self._write("run", kept)

    def _write(self, what: str, entry: Measurement | Capacity | Kept) -> None:
        if self._file is not None:
            with self._file.open("ab") as file:
                file.write(msgspec.json.encode({what: entry}) + b"\n")

    def _read(self, file: Path, measurement: Measurement) -> None:
        # What follows the last line break was cut off by a kill.
        whole, _, rest = file.read_bytes().rpartition(b"\n")
        if rest:
            file.write_bytes(whole + b"\n" if whole else b"")
        lines = [msgspec.json.decode(line) for line in whole.splitlines()]
        if not lines:
            self._write("of", measurement)
            return
        _check_same(file, msgspec.convert(lines[0]["of"], Measurement), measurement)
        for line in lines[1:]:
            if "capacity" in line:
                self.capacity_per_s = msgspec.convert(line["capacity"], Capacity).per_s
            else:
                kept = msgspec.convert(line["run"], Kept)
                self._kept[kept.row.run] = kept


def finish(folder: Path) -> None:
    """Remove the journal: the measurement is finished, and kept elsewhere."""
    (folder / JOURNAL_FILE).unlink(missing_ok=True)


def _check_same(file: Path, before: Measurement, now: Measurement) -> None:
    told = msgspec.json.decode(msgspec.json.encode(now))  # as a line has it: lists for tuples
    old = {**before.settings, "machine": before.machine}
    new = {**told["settings"], "machine": told["machine"]}
    differing = [
        f"{name} {old.get(name)} there, {new.get(name)} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{file} holds an unfinished measurement with other settings: {'; '.join(differing)}. Finish that one, "
            "remove the file, or name another --out"
        )
