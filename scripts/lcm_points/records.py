"""Kept records of `manylora bench image`: the newest of a table, and its rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.bench.image.intervals import Interval
from manylora.bench.image.report import from_json
from manylora.bench.image.table import RowFigures
from points import Line
from tested import ROOT

RECORDS = ROOT / "benchmarks" / "records"


@dataclass(frozen=True)
class Record:
    """One measured table."""

    values: Mapping[str, Any]
    rows: Sequence[RowFigures]

    @property
    def guidance(self) -> float:
        """The teacher's."""
        return float(self.values["config"]["guidance"])

    def find(self, **wanted: object) -> RowFigures | None:
        """Return the row with these settings, None where there is none."""
        for row in self.rows:
            if all(getattr(row.row, name) == value for name, value in wanted.items()):
                return row
        return None

    def line(self, min_pictures: int) -> Line:
        """Say where the figures that follow are from, and whether there are enough pictures behind each."""
        values, judge = self.values, self.values["judge"]
        accuracy = ", ".join(f"{k} {v:.1%}" for k, v in judge.get("held_out_accuracy", {}).items())
        num = values["prompts"]["num_pictures"]
        return Line(
            f"{values['table']}: {values['started'][:10]}, commit {values['commit']}, "
            f"judge {judge['sha256'][:8]}",
            f"{num} pictures a row; judge on held-out: {accuracy}",
            f">= {min_pictures}; `{values['command']}`",
            num >= min_pictures,
        )


def newest(table: str, folder: Path | None = None) -> Record | None:
    """Return the newest kept record of a table."""
    files = (folder or RECORDS).glob(f"*_image-{table}.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not records:
        return None
    values = max(records, key=lambda record: str(record["started"]))
    return Record(values, [from_json(row) for row in values["rows"]])


def percent(interval: Interval) -> str:
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def thousandth(interval: Interval) -> str:
    """KID as papers print it."""
    return f"{1000 * interval.value:.1f} [{1000 * interval.low:.1f}, {1000 * interval.high:.1f}]"
