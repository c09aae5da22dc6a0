"""Throughput beside the peers. It takes 20 minutes on an idle machine, so the kept record is read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from points import Line, missing

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"
COMMAND = "make bench"
WANTED = {
    "adapters": 128,
    "requests": 128,
    "prompt_tokens": 64,
    "output_tokens": 64,
    "dtype": "float32",
    "mixture": 1,
}
BOUNDS = {
    "transformers": ("base alone / transformers", 1.3),
    "peft": ("with adapters / PEFT's mixed batch", 2.5),
}


def lines() -> Iterator[Line]:
    row = _newest()
    if row is None:
        yield missing("throughput beside the peers", COMMAND)
        return
    yield Line(
        f"record of {row['started'][:10]}, commit {row['commit'][:9]}: `{COMMAND}`",
        f"base {row['base_tokens_per_s']:.0f}, with adapters {row['tokens_per_s']:.0f} tokens/s, "
        f"toll {row['toll']:.0%}",
        "reported as it is",
        True,
    )
    for peer, (what, bound) in BOUNDS.items():
        figures = row["peers"][peer]
        yield Line(
            f"{what} ({figures['tokens_per_s']:.0f} tokens/s at batch {figures['batch']})",
            f"{figures['speedup']:.2f}",
            f">= {bound}",
            figures["speedup"] >= bound,
        )


def _newest() -> dict[str, Any] | None:
    rows = [
        json.loads(line)
        for file in sorted(RECORDS.glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    fitting = [
        row
        for row in rows
        if BOUNDS.keys() <= row["peers"].keys()
        and all(row["config"].get(k) == v for k, v in WANTED.items())
    ]
    return max(fitting, key=lambda row: str(row["started"]), default=None)
