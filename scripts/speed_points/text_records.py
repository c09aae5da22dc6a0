"""Kept rows of `manylora bench text`: the newest that was measured with certain settings."""

import json
from pathlib import Path
from typing import Any

from tested import ROOT

RECORDS = ROOT / "benchmarks" / "records"

Row = dict[str, Any]

USUAL = {
    "model": "smollm2-135m-instruct",
    "requests": 128,
    "prompt_tokens": 64,
    "output_tokens": 64,
    "mixture": 1,
    "max_batch": 128,
    "pool_bytes": 0,
    "resident": False,
    "kv_cache_dtype": "auto",
    "adapter_dtype": "auto",
}
"""What every claim about throughput is measured with, unless it says otherwise."""

SINCE = {"kv_cache_dtype": "auto", "adapter_dtype": "auto"}
"""Options that older rows do not have, at what was then the only way."""


def newest(
    *, peers: tuple[str, ...] = (), without: tuple[str, ...] = (), folder: Path = RECORDS, **wanted: object
) -> Row | None:
    """The newest row with these settings in which these peers ran, and our engine without these ideas."""
    settings = {**USUAL, **wanted}
    fitting = [
        row
        for row in rows_of(folder)
        if set(peers) <= row["peers"].keys()
        and set(without) <= row.get("without", {}).keys()
        and all({**SINCE, **row["config"]}.get(name) == value for name, value in settings.items())
    ]
    return max(fitting, key=lambda row: str(row["started"]), default=None)


def rows_of(folder: Path = RECORDS) -> list[Row]:
    """Every row of the text benchmark, in the order of the files."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [row for row in map(json.loads, lines) if row.get("bench") == "text"]


def said(row: Row) -> str:
    """Where a row is from."""
    forced = ", machine busy" if row["forced"] else ""
    return f"{row['started'][:10]}, commit {row['commit'][:9]}{' with changes' if row['dirty'] else ''}{forced}"
