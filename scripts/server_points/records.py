"""Kept records of `manylora bench serve`: the newest of a kind, and its runs."""

import json
from pathlib import Path
from typing import Any

from tested import ROOT

RECORDS = ROOT / "benchmarks" / "records"

Row = dict[str, Any]


def newest(kind: str, num_adapters: int, folder: Path = RECORDS) -> dict[str, Any] | None:
    """The newest record of a kind with so many adapters."""
    files = folder.glob(f"*_serve-{kind}-{num_adapters}.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return max(records, key=lambda record: str(record["started"]), default=None)


def said(record: dict[str, Any]) -> str:
    """Where figures are from."""
    return (
        f"{record['started'][:10]}, commit {record['commit']}{' with changes' if record['dirty'] else ''}"
    )


def find(record: dict[str, Any], **wanted: object) -> Row | None:
    """The run with these settings; None where there is none."""
    for row in record["rows"]:
        if all(row["run"][name] == value for name, value in wanted.items()):
            return dict(row)
    return None
