"""How near few steps come to many: KID of the acceleration LoRAs against the teacher and samplers without training.

Read from the kept records. `steps` has all rows; `close` those of 4 steps alone, whose KID lies nearest, for eight
times the pictures: what it has is read from it.
"""

from collections.abc import Iterator

from lcm_points.records import Record, newest, thousandth
from manylora.bench.image.rows import MANY_STEPS
from manylora.bench.image.table import RowFigures
from points import Line, missing

COMMAND = "examples/lcm/run.sh phased steps"
CLOSE_COMMAND = "examples/lcm/run.sh close"
FULL_COMMAND = "examples/lcm/run.sh full"
MIN_PICTURES = 500
SHARES = {4: 0.15, 2: 0.35}
"""Of what the teacher loses from 32 steps to as many: most that an acceleration LoRA may lose."""

SAMPLERS = ("dpm-solver++", "unipc")


def lines() -> Iterator[Line]:
    record = newest("steps")
    if record is None:
        yield missing("few steps, with the acceleration LoRAs", COMMAND)
        return
    yield record.line(MIN_PICTURES)
    close = newest("close")
    if close is None:
        yield missing("4 steps, with more pictures", CLOSE_COMMAND)
    else:
        yield close.line(MIN_PICTURES)
    for steps, share in SHARES.items():
        yield _near_the_teacher(_that_has(steps, record, close), steps, share)
    for steps in (1, 2, 4):
        yield from _ahead(_that_has(steps, record, close), steps, record.guidance)
        yield from _ahead(record, steps, 1.0)
    yield _second_objective(record)
    yield from _beside_all_weights()


def fast_rows(record: Record, steps: int) -> list[RowFigures]:
    """The acceleration LoRAs of the base at so many steps."""
    found = [row for row in record.rows if row.row.lora and not row.row.base and row.row.steps == steps]
    return [row for row in found if row.row.guidance == 1.0]


def _that_has(steps: int, record: Record, close: Record | None) -> Record:
    """The record of more pictures, where it has rows of so many steps."""
    return close if close is not None and fast_rows(close, steps) else record


def _near_the_teacher(record: Record, steps: int, share: float) -> Line:
    many, few = (
        record.find(sampler="ddim", steps=n, guidance=record.guidance, base="", lora="")
        for n in (MANY_STEPS, steps)
    )
    ours = min(fast_rows(record, steps), key=lambda row: row.kid.value, default=None)
    point = f"{steps} steps: KID x 1000 above the teacher's at {MANY_STEPS}"
    if many is None or few is None or ours is None:
        return missing(point, COMMAND)
    lost, may = ours.kid.value - many.kid.value, share * (few.kid.value - many.kid.value)
    return Line(
        point,
        f"{ours.row.lora}: {thousandth(ours.kid)} - {1000 * many.kid.value:.1f} = {1000 * lost:.1f}",
        f"<= {share:g} x what the teacher loses = {1000 * may:.1f}",
        lost <= may,
    )


def _ahead(record: Record, steps: int, guidance: float) -> Iterator[Line]:
    """At equal steps, the others guided and not: more than `make show-lcm` asks, which compares at equal UNet calls, of
    which a guided step takes two."""
    ours = min(fast_rows(record, steps), key=lambda row: row.kid.value, default=None)
    how = "unguided" if guidance == 1.0 else f"guidance {guidance:g}, twice the calls"
    for name in SAMPLERS:
        point = f"{steps} step{'s' * (steps > 1)}: KID x 1000 against {name}, {how}"
        other = record.find(sampler=name, steps=steps, guidance=guidance, base="", lora="")
        if ours is None or other is None:
            yield missing(point, COMMAND)
            continue
        yield Line(
            point,
            f"{ours.row.lora}: {thousandth(ours.kid)} / {thousandth(other.kid)}",
            "ahead, intervals apart",
            ours.kid.below(other.kid),
        )


def _second_objective(record: Record) -> Line:
    point = "1 step: the second objective / LCM, KID x 1000"
    lcm = record.find(sampler="lcm", steps=1, lora=record.values["config"]["lcm"], base="")
    others = [row for row in fast_rows(record, 1) if row.row.sampler == "ddim"]
    if lcm is None or not others:
        return missing(point, COMMAND)
    ours = min(others, key=lambda row: row.kid.value)
    return Line(
        point,
        f"{thousandth(ours.kid)} / {thousandth(lcm.kid)}; RMSE {ours.paired_rmse} / {lcm.paired_rmse}",
        "lower",
        ours.kid.value < lcm.kid.value,
    )


def _beside_all_weights() -> Iterator[Line]:
    record = newest("full")
    if record is None:
        yield missing("the LoRA beside all weights distilled", FULL_COMMAND)
        return
    yield record.line(MIN_PICTURES)
    for steps in (4, 2):
        lora = record.find(sampler="lcm", steps=steps, lora=record.values["config"]["lcm"])
        full = record.find(sampler="lcm", steps=steps, lora="")
        point = f"{steps} steps: LCM-LoRA / all weights distilled, KID x 1000"
        if lora is None or full is None:
            yield missing(point, FULL_COMMAND)
        else:
            yield Line(point, f"{thousandth(lora.kid)} / {thousandth(full.kid)}", "reported", True)
