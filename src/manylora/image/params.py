"""How one picture is made. Knows no model, tensor or file; what depends on the base is checked by `intake`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from manylora.errors import RequestError

SAMPLERS = ("lcm", "ddim", "euler", "dpm-solver++", "unipc")
"""`lcm` is for a base with an LCM-LoRA; the others need no training."""

MAX_SEED = 2**63 - 1
"""Seeds of torch's generators; one less bit, so that the seeds of a request's further pictures are seeds too."""

DEFAULT_STRENGTH = 0.8

ORIGINAL_STEPS = 50
"""Of published LCM-LoRAs, and what `distill` has by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageParams:
    """What a request asks of sampling. Everything is checked when it is made.

    Raises:
        RequestError: a value of the wrong type or out of range, or one that would have no effect; names the field,
            what it takes, what came.
    """

    sampler: str = "lcm"
    """lcm (for a base with an LCM-LoRA); without training: ddim, euler, dpm-solver++, unipc."""

    steps: int = 4
    """Steps of the sampler over the whole schedule. From a picture, lcm takes so many over the part that strength
    says, the others only that part of them."""

    original_steps: int = ORIGINAL_STEPS
    """lcm: steps of the solver that the LoRA was distilled with (num_solver_steps), on whose grid it is asked.
    diffusers calls it original_inference_steps."""

    guidance: float = 1.0
    """Classifier-free guidance scale: conditional and unconditional differences are multiplied by it. 1 is off and
    halves the cost; an LCM-LoRA takes 1 to 2, other samplers mostly 3 to 8."""

    negative_prompt: str | None = None
    """What guidance leads away from; only with guidance above 1."""

    seed: int | None = None
    """All noise of a picture comes from its seed alone, so that it looks the same in any batch. Picture i of n has
    seed + i. None: a new one."""

    width: int | None = None
    """Pixels; by default those of the picture to start from, or what the base was trained for."""

    height: int | None = None
    """Pixels, as width."""

    strength: float | None = None
    """From a picture: share of the schedule that is run, in (0, 1]; more changes more. 0.8 by default."""

    n: int = 1
    """Pictures to make of the prompt."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            _refuse("sampler", f"one of {', '.join(SAMPLERS)}", self.sampler)
        for name, low in (
            ("steps", 1),
            ("original_steps", 1),
            ("n", 1),
            ("width", 1),
            ("height", 1),
            ("seed", 0),
        ):
            _check_integer(name, getattr(self, name), low, MAX_SEED if name == "seed" else None)
        if self.sampler != "lcm" and self.original_steps != ORIGINAL_STEPS:
            expected = f"{ORIGINAL_STEPS}, since it has no effect on samplers other than lcm"
            _refuse("original_steps", expected, self.original_steps)
        # So written, comparisons refuse NaN too.
        if not _is_number(self.guidance) or not 1 <= self.guidance <= 1000:
            _refuse("guidance", "a number from 1 (off) to 1000", self.guidance)
        if self.strength is not None and (not _is_number(self.strength) or not 0 < self.strength <= 1):
            _refuse("strength", "a number above 0 and at most 1", self.strength)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            _refuse("negative_prompt", "text", self.negative_prompt)
        if self.negative_prompt and not self.is_guided:
            _refuse(
                "negative_prompt",
                "none at guidance 1, where it has no effect (raise guidance)",
                self.negative_prompt,
            )

    @property
    def is_guided(self) -> bool:
        return self.guidance != 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageParams":
        """Make params from names and values.

        Raises:
            RequestError: a name that is no field; says which are.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise RequestError(f"unknown image parameters {unknown}; known: {known}")
        return cls(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, low: int, high: int | None) -> None:
    if value is None and name not in ("steps", "original_steps", "n"):
        return
    # bool is an int to Python; True as a count is a mistake of the caller.
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        _refuse(
            name,
            f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}",
            value,
        )


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise RequestError(f"image parameter {name}: expected {expected}, got {got!r}")
