"""What is left of a style beside acceleration: style 0.8 + acceleration 1.0 at 4 steps, against it alone at 32."""

from collections.abc import Iterator

from lcm_points.records import Record, newest, percent
from lcm_points.universal import MIN_KEPT
from manylora.bench.image.rows import MANY_STEPS, STYLE_WEIGHT
from points import Line, missing

COMMAND = "examples/lcm/run.sh phased universal"
STEPS = 4


def lines() -> Iterator[Line]:
    record = newest("universal")
    if record is None:
        yield missing("styles beside acceleration", COMMAND)
        return
    kept: dict[str, dict[str, float]] = {}
    for style in record.values["config"]["styles"]:
        yield from _of(record, style, kept)
    yield _best(kept)


def _of(record: Record, style: str, kept: dict[str, dict[str, float]]) -> Iterator[Line]:
    alone = f"{style}:{STYLE_WEIGHT}"
    slow = record.find(lora=alone, steps=MANY_STEPS, base="")
    if slow is None or slow.look_share is None or not slow.look_share.value:
        yield missing(f"{style} alone at {MANY_STEPS} steps", COMMAND)
        return
    for row in record.rows:
        if not row.row.lora.startswith(f"{alone}+") or row.row.steps != STEPS or row.look_share is None:
            continue
        fast = row.row.lora.removeprefix(f"{alone}+")
        share = row.look_share.value / slow.look_share.value
        kept.setdefault(fast, {})[style] = share
        yield Line(
            f"{style} + {fast}, {STEPS} steps / alone at {MANY_STEPS}: style kept",
            f"{percent(row.look_share)} / {percent(slow.look_share)} = {share:.0%}",
            "reported; the bound is below",
            True,
        )


def _best(kept: dict[str, dict[str, float]]) -> Line:
    """One acceleration LoRA has to keep all styles."""
    if not kept:
        return missing("one acceleration LoRA that keeps every style", COMMAND)
    name, shares = max(kept.items(), key=lambda one: min(one[1].values()))
    worst = min(shares, key=lambda style: shares[style])
    return Line(
        f"{name}: style kept at {STEPS} steps, the least of {len(shares)} styles",
        f"{worst}: {shares[worst]:.0%}",
        f">= {MIN_KEPT:.0%}",
        shares[worst] >= MIN_KEPT,
    )
