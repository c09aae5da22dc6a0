"""What each idea brings: the engine beside itself without it, in one run. Read from kept records."""

from collections.abc import Iterator, Mapping

from points import Line, missing
from speed_points.text_records import newest, said

COMMAND = "benchmarks/figures/ablations.sh"

SHARED: Mapping[str, object] = {"adapters": 32, "rank": [8], "distribution": "uniform", "dtype": "float32"}

RUNS: tuple[tuple[tuple[str, ...], Mapping[str, object]], ...] = (
    (("native", "onecall", "grouping", "batching"), SHARED),
    (("unified",), {**SHARED, "pool_bytes": 600_000_000}),
    (
        ("prefetch",),
        {
            **SHARED,
            "adapters": 384,
            "requests": 384,
            "distribution": "distinct",
            "pool_bytes": 2_200_000_000,
        },
    ),
)
"""What is left out, and the settings of the run."""

MIN_EQUAL = 0.9
"""Share of answers that must be the same without it: what is left out changes the time, not what is computed."""


def lines() -> Iterator[Line]:
    for without, settings in RUNS:
        row = newest(without=without, **settings)
        if row is None:
            yield missing(f"ablations: {', '.join(without)}", COMMAND)
            continue
        for name in without:
            figures = row["without"][name]
            gain, share = figures["speedup"], figures["equal_outputs"]
            yield Line(
                f"without {name} ({said(row)})",
                f"{figures['tokens_per_s']:.0f} tokens/s; with it {gain:.2f} times as many; {share:.0%} equal",
                f"> 1 and >= {MIN_EQUAL:.0%} equal; `{COMMAND}`",
                gain > 1 and share >= MIN_EQUAL and not row["forced"],
            )
