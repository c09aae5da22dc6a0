"""First token of adapters never read before, beside that of warm ones. Read from kept records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from points import Line, missing
from speed_points.text_records import RECORDS, said

COMMAND = "benchmarks/figures/first_token.sh"
DTYPES = ("float32", "int8")
NUM_SAMPLES = 200
SETTINGS = {"rank": 8, "prompt_tokens": 64, "in_pool": 32}
ADAPTER_DTYPES = {"float32": "auto", "int8": "int8"}
BOUNDS = {"p50": 1.2, "p99": 1.5}


def lines() -> Iterator[Line]:
    for dtype in DTYPES:
        record = newest(dtype)
        if record is None:
            yield missing(f"first token of an adapter never read, {dtype}", COMMAND)
            continue
        config = record["config"]
        yield Line(
            f"first token, {dtype}: {said(record)}",
            f"{config['samples']} adapters of rank {config['rank']}, {record['adapter_loads']} loads",
            f">= {NUM_SAMPLES}, each loaded; `{COMMAND}`",
            config["samples"] >= NUM_SAMPLES
            and record["adapter_loads"] == config["samples"]
            and not record["forced"],
        )
        for percentile, bound in BOUNDS.items():
            cold, warm = (1000 * record[kind][f"{percentile}_s"] for kind in ("cold", "warm"))
            ratio = record[f"{percentile}_ratio"]
            yield Line(
                f"  never read / warm, {percentile}",
                f"{cold:.1f} / {warm:.1f} ms = {ratio:.2f}",
                f"<= {bound}",
                ratio <= bound,
            )


def newest(dtype: str, folder: Path = RECORDS) -> dict[str, Any] | None:
    """The newest record of a dtype and the figure's settings."""
    files = folder.glob(f"*_first-token-{dtype}-*.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    wanted = SETTINGS | {"adapter_dtype": ADAPTER_DTYPES[dtype]}
    fitting = [record for record in records if wanted.items() <= record["config"].items()]
    return max(fitting, key=lambda record: str(record["started"]), default=None)
