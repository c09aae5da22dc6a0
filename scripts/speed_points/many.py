"""What more adapters, and mixtures of them, cost. Read from kept records."""

from collections.abc import Callable, Iterator

from points import Line, missing
from speed_points import first_token
from speed_points.text_records import Row, newest, said

COMMAND = "benchmarks/figures/many_adapters.sh"
MIXTURES_COMMAND = "benchmarks/figures/mixtures.sh"
FEW, SOME, MANY = 1, 200, 2000
SETTINGS = {
    "rank": [8],
    "distribution": "uniform",
    "dtype": "float32",
    "requests": 384,
    "pool_bytes": 2_200_000_000,
}
MAX_DROP = 0.06
MAX_OVER_SINGLE = 1.1


def lines() -> Iterator[Line]:
    yield from _more_adapters()
    yield from _mixtures()


def _more_adapters() -> Iterator[Line]:
    rows: dict[int, Row] = {}
    for adapters in (FEW, SOME, MANY):
        row = newest(adapters=adapters, **SETTINGS)
        if row is None:
            yield missing(f"{adapters:,} registered, room for 256", COMMAND)
            continue
        rows[adapters] = row
        yield Line(
            f"{adapters:,} registered, room for 256: {said(row)}",
            f"{row['tokens_per_s']:.0f} tokens/s (base {row['base_tokens_per_s']:.0f}); "
            f"{row['distinct_adapters_per_step']:.0f} a step, {row['adapter_loads']} loads{_cost(row)}",
            f"floor {row['floors']['tokens_per_s']:.0f} tokens/s; reading rank rows {row['floors']['lora_s']:.1f} s",
            row["config"]["repeats"] >= 3 and not row["forced"],
        )
    for fewer, bound in ((SOME, MAX_DROP), (FEW, None)):
        if {fewer, MANY} <= rows.keys():
            yield _drop(rows, fewer, bound)


def _cost(row: Row) -> str:
    """What its loads come to, each as long as it keeps a first token waiting on an idle engine."""
    record = first_token.newest(row["config"]["dtype"])
    if record is None:
        return ""
    load_s = record["cold"]["p50_s"] - record["warm"]["p50_s"]
    return f" ({row['adapter_loads'] * load_s:.1f} s at {1000 * load_s:.0f} ms each)"


def _drop(rows: dict[int, Row], fewer: int, bound: float | None) -> Line:
    def drop_of(rate: Callable[[Row], float]) -> float:
        return 1 - rate(rows[MANY]) / rate(rows[fewer])

    drop = drop_of(lambda row: row["tokens_per_s"])
    # Some of it may be an hour in which the machine is slower.
    beside_base = drop_of(lambda row: row["tokens_per_s"] / row["base_tokens_per_s"])
    return Line(
        f"from {fewer:,} to {MANY:,} adapters: drop",
        f"{drop:.1%}; beside the base of the same run, {beside_base:.1%}",
        f"<= {bound:.0%}; `{COMMAND}`" if bound else "reported",
        bound is None or drop <= bound,
    )


def _mixtures() -> Iterator[Line]:
    shared = {
        "adapters": 64,
        "requests": 64,
        "resident": True,
        "distribution": "uniform",
        "dtype": "float32",
    }
    three, one = newest(mixture=3, rank=[8], **shared), newest(mixture=1, rank=[24], **shared)
    point = "mixtures of three adapters of rank 8, beside one of rank 24: time"
    if three is None or one is None:
        yield missing(point, MIXTURES_COMMAND)
        return
    over = one["tokens_per_s"] / three["tokens_per_s"]
    yield Line(
        point,
        f"{over:.2f} ({three['tokens_per_s']:.0f} / {one['tokens_per_s']:.0f} tokens/s; {said(three)})",
        f"<= {MAX_OVER_SINGLE}; `{MIXTURES_COMMAND}`",
        over <= MAX_OVER_SINGLE and not three["forced"] and not one["forced"],
    )
