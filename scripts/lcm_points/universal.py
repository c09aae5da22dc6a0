"""Universal and composable: the LCM-LoRA untouched beside each style, and in a base fine-tuned on another set.

Kept, at 4 steps: the style, as the share of pictures that a classifier of styles assigns to it, and the prompt, as the
same classifier's hit rate among the names; both against the same style alone at 32 steps. The same is asked of a LoRA
that was distilled by phases. Read from the kept record.
"""

from collections.abc import Iterator

from lcm_points.records import Record, newest, percent
from manylora.bench.image.rows import MANY_STEPS, STYLE_WEIGHT
from manylora.bench.image.table import RowFigures
from points import Line, missing

COMMAND = (
    "manylora bench image --table universal --base BASE --judge JUDGE --style-judge STYLE_JUDGE --data HELD_OUT "
    "--guidance W+1 --loras LORAS --styles NAME,.. --phased NAME --finetuned BASE2 --finetuned-look NAME "
    "--num-prompts 100 --num-seeds 3 --chance seeds --record"
)
MIN_PICTURES = 300
MIN_STYLES = 4
MIN_KEPT = 0.90
"""Of the share that the style alone has at 32 steps."""

MAX_ACCURACY_LOST = 0.10


def lines() -> Iterator[Line]:
    record = newest("universal")
    if record is None:
        yield missing("LCM-LoRA beside styles and in another base", COMMAND)
        return
    yield record.line(MIN_PICTURES)
    config = record.values["config"]
    styles, lcm, phased = config["styles"], config["lcm"], config["phased"]
    yield Line(
        "styles that the base has not seen",
        ", ".join(styles),
        f">= {MIN_STYLES}",
        len(styles) >= MIN_STYLES,
    )
    if not phased:
        yield missing("a LoRA distilled by phases beside styles", COMMAND)
    for style in styles:
        alone = f"{style}:{STYLE_WEIGHT}"
        slow = record.find(lora=alone, steps=MANY_STEPS, base="")
        for name, lora in (("LCM-LoRA", lcm), *((name, name) for name in phased)):
            yield from _kept(style, name, record.find(lora=f"{alone}+{lora}", steps=4, base=""), slow)
    yield from _in_another_base(record, lcm)


def _in_another_base(record: Record, lcm: str) -> Iterator[Line]:
    finetuned = record.values["config"]["finetuned"]
    if not finetuned:
        yield missing("LCM-LoRA in a base fine-tuned on another set", COMMAND)
        return
    ours = record.find(base=finetuned, lora=lcm, steps=4)
    yield from _kept(
        "fine-tuned base", "LCM-LoRA", ours, record.find(base=finetuned, lora="", steps=MANY_STEPS)
    )
    plain = record.find(base=finetuned, lora="", steps=4)
    if ours is not None and plain is not None:
        yield Line(
            "fine-tuned base, 4 steps, LCM-LoRA / DDIM: prompt",
            f"{percent(ours.style_accuracy)} / {percent(plain.style_accuracy)}",
            "not behind",
            not ours.style_accuracy.below(plain.style_accuracy),
        )


def _kept(name: str, lora: str, fast: RowFigures | None, slow: RowFigures | None) -> Iterator[Line]:
    if fast is None or slow is None:
        yield missing(f"{name}: {lora} at 4 steps", COMMAND)
        return
    if fast.look_share is not None and slow.look_share is not None:
        kept = fast.look_share.value / slow.look_share.value if slow.look_share.value else 0.0
        yield Line(
            f"{name}: style at 4 steps with {lora} / alone at 32",
            f"{percent(fast.look_share)} / {percent(slow.look_share)} = {kept:.0%}",
            f">= {MIN_KEPT:.0%}",
            kept >= MIN_KEPT,
        )
    lost = slow.style_accuracy.value - fast.style_accuracy.value
    yield Line(
        f"{name}: prompt at 4 steps with {lora} / alone at 32",
        f"{percent(fast.style_accuracy)} / {percent(slow.style_accuracy)}",
        f"within {MAX_ACCURACY_LOST * 100:.0f} points",
        lost <= MAX_ACCURACY_LOST,
    )
