"""Steps that matter: the LCM-LoRA at 4 and 2 steps against the teacher, against samplers without training at as many
UNet calls, and against its own sampler without the LoRA. Read from the kept record, which takes 20 minutes to make.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from lcm_points.records import Record, newest, percent, thousandth
from manylora.bench.image.intervals import Interval
from manylora.bench.image.rows import FREE_SAMPLERS, MANY_STEPS
from manylora.bench.image.table import RowFigures
from points import Line, missing

COMMAND = (
    "manylora bench image --table {table} --base BASE --judge JUDGE --data HELD_OUT --train-data TRAIN "
    "--guidance W+1 --loras LORAS --num-prompts 100 --num-seeds 5 --chance seeds --record"
)
MIN_PICTURES = 500
MAX_ACCURACY_LOST = 0.10
"""Of the teacher's prompt accuracy at 32 steps, by the LCM-LoRA at 4."""


def lines() -> Iterator[Line]:
    yield from _sweep()
    record = newest("steps")
    if record is None:
        yield missing("few steps, with and without the LCM-LoRA", COMMAND.format(table="steps"))
        return
    yield record.line(MIN_PICTURES)
    lcm = record.values["config"]["lcm"]
    for steps in (2, 4):
        ours = record.find(sampler="lcm", steps=steps, lora=lcm, base="")
        if ours is None:
            yield missing(f"LCM-LoRA at {steps} steps", COMMAND.format(table="steps"))
            continue
        yield from _against_free_samplers(record, ours, steps)
        yield from _against_no_lora(record, ours, steps)
    yield from _against_the_teacher(record, lcm)
    yield from _one_step(record, lcm)


def _sweep() -> Iterator[Line]:
    """The teacher's guidance is the best of the sweep, by KID to held-out pictures."""
    record = newest("sweep")
    if record is None:
        yield missing("the teacher's guidance, chosen once", COMMAND.format(table="sweep"))
        return
    best = min(record.rows, key=lambda row: row.kid.value)
    steps = newest("steps")
    used = record.guidance if steps is None else steps.guidance
    told = ", ".join(f"{row.row.guidance:g}: {1000 * row.kid.value:.1f}" for row in record.rows)
    chosen = record.find(guidance=used)
    # A scale whose interval holds the best one's figure cannot be told from it.
    ok = chosen is not None and chosen.kid.low <= best.kid.value
    yield Line(
        f"guidance {used:g} of the teacher: KID x 1000 at 32 steps", told, "not worse than the best", ok
    )


def _against_free_samplers(record: Record, ours: RowFigures, steps: int) -> Iterator[Line]:
    """At equal UNet calls ahead at 2 steps, with the intervals apart, and not behind at 4; guided and unguided.

    A guided step is two calls, so half as many of them are compared. As many guided steps, at twice the calls, are
    reported beside.
    """
    for name in FREE_SAMPLERS:
        for guidance, num, is_bound in (
            (1.0, steps, True),
            (record.guidance, steps // 2, True),
            (record.guidance, steps, False),
        ):
            other = record.find(sampler=name, steps=num, guidance=guidance, base="", lora="")
            how = "unguided" if guidance == 1.0 else f"guidance {guidance:g}"
            how = f"{num} step{'s' * (num > 1)}, {how}"
            if other is None:
                yield missing(f"{name}, {how}", COMMAND.format(table="steps"))
                continue
            for line in _compared(
                f"{steps} steps, LCM-LoRA / {name}, {how}", ours, other, apart=steps == 2
            ):
                yield line if is_bound else replace(line, bound="reported: twice the UNet calls", ok=True)


def _against_no_lora(record: Record, ours: RowFigures, steps: int) -> Iterator[Line]:
    other = record.find(sampler="lcm", steps=steps, lora="", base="", guidance=1.0)
    if other is None:
        yield missing(f"LCM sampler without LoRA, {steps} steps", COMMAND.format(table="steps"))
        return
    yield from _compared(f"{steps} steps, LCM-LoRA / its sampler without it", ours, other, apart=steps == 2)


def _compared(point: str, ours: RowFigures, other: RowFigures, *, apart: bool) -> Iterator[Line]:
    """A line for each metric; lower is better in the first two."""
    shown: tuple[tuple[str, Callable[[Interval], str], int], ...] = (
        ("kid", thousandth, -1),
        ("frechet", str, -1),
        ("accuracy", percent, 1),
    )
    for name, show, sign in shown:
        own, theirs = getattr(ours, name), getattr(other, name)
        yield Line(
            f"{point}: {name}",
            f"{show(own)} / {show(theirs)}",
            "ahead, intervals apart" if apart else "not behind",
            is_ahead(own, theirs, sign) if apart else not is_ahead(theirs, own, sign),
        )


def is_ahead(own: Interval, other: Interval, sign: int) -> bool:
    """Whether a figure is better with the intervals apart; sign is 1 where more is better, else -1."""
    return other.below(own) if sign > 0 else own.below(other)


def _against_the_teacher(record: Record, lcm: str) -> Iterator[Line]:
    teacher = record.find(sampler="ddim", steps=MANY_STEPS, guidance=record.guidance, base="")
    ours = record.find(sampler="lcm", steps=4, lora=lcm, base="")
    if teacher is None or ours is None:
        yield missing("LCM-LoRA at 4 / teacher at 32", COMMAND.format(table="steps"))
        return
    lost = teacher.accuracy.value - ours.accuracy.value
    yield Line(
        "LCM-LoRA at 4 / teacher at 32: prompt accuracy",
        f"{percent(ours.accuracy)} / {percent(teacher.accuracy)}",
        f"within {MAX_ACCURACY_LOST * 100:.0f} points",
        lost <= MAX_ACCURACY_LOST,
    )
    yield Line(
        "LCM-LoRA at 4 / teacher at 32: KID x 1000",
        f"{thousandth(ours.kid)} / {thousandth(teacher.kid)}",
        "reported",
        True,
    )


def _one_step(record: Record, lcm: str) -> Iterator[Line]:
    """Alone here the noise decides the picture, so that the distance to the teacher's 50 steps can be paired."""
    ours = record.find(sampler="lcm", steps=1, lora=lcm, base="")
    plain = record.find(sampler="ddim", steps=1, guidance=record.guidance, base="")
    if ours is None or plain is None or ours.paired_rmse is None or plain.paired_rmse is None:
        yield missing("one step: paired distance", COMMAND.format(table="steps"))
        return
    yield Line(
        "one step, LCM-LoRA / DDIM: latent RMSE to the teacher's 50 steps",
        f"{ours.paired_rmse} / {plain.paired_rmse}",
        "closer, intervals apart",
        ours.paired_rmse.below(plain.paired_rmse),
    )
