"""What is compared: the rows of each table, as data. Knows no model and no figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from manylora.errors import ConfigError

TEACHER_STEPS = 50
"""DDIM steps that distillation jumps over; what paired distances are measured from."""

MANY_STEPS = 32
"""Steps at which a base counts as undisturbed by their number."""

FEW_STEPS = (8, 4, 2, 1)
STYLE_WEIGHT = 0.8
FREE_SAMPLERS = ("ddim", "dpm-solver++", "unipc")
"""Samplers that need no training."""

Source = Literal["sampler", "vae", "real"]


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One way of getting pictures of the prompts."""

    label: str
    source: Source = "sampler"
    """`real`: drawn pictures; `vae`: the same, encoded and decoded. They say what a perfect model would get, and what
    the decoder costs any."""
    sampler: str = "ddim"
    steps: int = TEACHER_STEPS
    guidance: float = 1.0
    """1 is off."""
    lora: str = ""
    """The mixture, as `Mixture.parse` reads it; empty for the base alone."""
    base: str = ""
    """Folder of another base than the table's."""
    look: str | None = None
    """The style whose share is measured."""

    @property
    def unet_calls(self) -> int:
        """Rows of the UNet's batch that one picture takes."""
        return 0 if self.source != "sampler" else self.steps * (1 if self.guidance == 1.0 else 2)

    @property
    def is_paired(self) -> bool:
        """Whether the first noise alone decides the picture, so that it has a partner from the same noise."""
        return self.source == "sampler" and (self.sampler != "lcm" or self.steps == 1) and not self.base


def steps_table(guidance: float, lcm: str, phased: Sequence[tuple[str, int]] = ()) -> list[ImageRow]:
    """Return the rows that say what few steps cost, and what the LoRA brings back.

    Args:
        guidance: the teacher's, w + 1.
        lcm: name of the LCM-LoRA.
        phased: LoRAs distilled by phases, NAME or NAME:WEIGHT, each with its number of steps.
    """
    rows = [
        ImageRow(label="real pictures", source="real"),
        ImageRow(label="real pictures through the VAE", source="vae"),
        *(_free("ddim", steps, guidance) for steps in (TEACHER_STEPS, MANY_STEPS, 16)),
        _free("ddim", MANY_STEPS, 1.0),
        *(_free(name, n, scale) for name in FREE_SAMPLERS for n in FEW_STEPS for scale in (guidance, 1.0)),
        *(_lcm("LCM sampler without LoRA", n, "", guidance=g) for g in (1.0, guidance) for n in (4, 2, 1)),
        *(_lcm("LCM-LoRA", n, lcm) for n in FEW_STEPS),
    ]
    return rows + _phased(phased)


def close_table(guidance: float, phased: Sequence[tuple[str, int]]) -> list[ImageRow]:
    """Return the rows of `steps_table` that come near the teacher at the steps of the LoRAs distilled by phases: few
    enough for so many pictures that their intervals come apart."""
    rows = [_free("ddim", MANY_STEPS, guidance)]
    for steps in dict.fromkeys(steps for _, steps in phased):
        rows += [_free(name, steps, guidance) for name in FREE_SAMPLERS]
        rows += _phased([(lora, n) for lora, n in phased if n == steps])
    return rows


def full_table(guidance: float, lcm: str, full: str) -> list[ImageRow]:
    """Return the rows that say what the LCM-LoRA lacks beside all weights distilled, at `full`."""
    rows = [_free("ddim", MANY_STEPS, guidance)]
    for steps in (4, 2, 1):
        rows += [_lcm("LCM-LoRA", steps, lcm), replace(_lcm("all weights distilled", steps, ""), base=full)]
    return rows


def sweep_table(guidances: Sequence[float]) -> list[ImageRow]:
    """Return the rows by which a teacher's guidance is chosen, once, at many steps."""
    return [_free("ddim", MANY_STEPS, guidance) for guidance in guidances]


def universal_table(
    guidance: float,
    lcm: str,
    styles: Sequence[str],
    finetuned: str = "",
    finetuned_look: str | None = None,
    phased: Sequence[tuple[str, int]] = (),
) -> list[ImageRow]:
    """Return the rows that say whether the LCM-LoRA goes with styles, and with another base, that it has never met."""
    rows = [_free("ddim", MANY_STEPS, guidance), _lcm("LCM-LoRA", 4, lcm)]
    rows += _phased(phased)
    for style in styles:
        alone = f"{style}:{STYLE_WEIGHT}"
        rows += [
            _named(f"{style} alone", "ddim", MANY_STEPS, guidance, alone, style),
            _named(f"{style} alone", "ddim", 4, guidance, alone, style),
            *(
                _named(f"{style} + LCM-LoRA", "lcm", steps, 1.0, f"{alone}+{lcm}", style)
                for steps in (4, 2)
            ),
            *(
                fast_row(f"{style} + phased LoRA", "ddim", steps, f"{alone}+{name}", style)
                for name, steps in phased
            ),
        ]
    if finetuned:
        in_it = [
            _free("ddim", MANY_STEPS, guidance, "fine-tuned base, "),
            _free("ddim", 4, guidance, "fine-tuned base, "),
            *(_lcm("fine-tuned base, LCM-LoRA", steps, lcm) for steps in (4, 2)),
        ]
        rows += [replace(row, base=finetuned, look=finetuned_look) for row in in_it]
    return rows


def find_row(rows: Sequence[ImageRow], **wanted: object) -> ImageRow:
    """Return the one row with these settings.

    Raises:
        ConfigError: none has them, or several.
    """
    found = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise ConfigError(f"expected one row with {wanted}, got {[row.label for row in found]}")
    return found[0]


def _free(sampler: str, steps: int, guidance: float, prefix: str = "") -> ImageRow:
    return _named(prefix + sampler, sampler, steps, guidance, "")


def fast_row(name: str, sampler: str, steps: int, lora: str, look: str | None = None) -> ImageRow:
    """Return a row of an acceleration LoRA, which takes no guidance."""
    return _named(name, sampler, steps, 1.0, lora, look)


def _phased(phased: Sequence[tuple[str, int]]) -> list[ImageRow]:
    """Return a row for each. The first LoRA for so many steps needs no name, others for as many do."""
    rows: list[ImageRow] = []
    first: dict[int, str] = {}
    for lora, steps in phased:
        name, _, weight = lora.partition(":")
        label = "phased LoRA" if first.setdefault(steps, name) == name else f"phased LoRA {name}"
        rows.append(fast_row(f"{label} at {weight}" if weight else label, "ddim", steps, lora))
    return rows


def _lcm(name: str, steps: int, lora: str, guidance: float = 1.0) -> ImageRow:
    return _named(name, "lcm", steps, guidance, lora)


def _named(
    name: str, sampler: str, steps: int, guidance: float, lora: str, look: str | None = None
) -> ImageRow:
    guided = "unguided" if guidance == 1.0 else f"guidance {guidance:g}"
    label = f"{name}, {steps} step{'s' * (steps > 1)}, {guided}"
    return ImageRow(label=label, sampler=sampler, steps=steps, guidance=guidance, lora=lora, look=look)
