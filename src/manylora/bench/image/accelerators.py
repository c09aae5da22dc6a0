"""How an acceleration LoRA is asked for pictures: by which sampler, in how many steps. Read from its distill.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.bench.image.rows import FEW_STEPS
from manylora.distill.output import RECORD
from manylora.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """One acceleration LoRA of a library."""

    name: str
    sampler: str = "lcm"
    steps: tuple[int, ...] = FEW_STEPS
    """Those that it is for."""

    def steps_near(self, wanted: int) -> int:
        """Return the number of steps, of those that it is for, that is nearest to `wanted`."""
        return min(self.steps, key=lambda steps: abs(steps - wanted))


def read_accelerator(folder: Path, name: str) -> Accelerator:
    """Return what the LoRA's own record says; without one it is an LCM-LoRA.

    Raises:
        ConfigError: a record of an objective that is not known.
    """
    file = folder / name / RECORD
    if not file.is_file():
        return Accelerator(name)
    told = json.loads(file.read_text(encoding="utf-8"))
    objective = told.get("objective", "lcm")  # a record from before there was a choice
    if objective == "lcm":
        return Accelerator(name)
    if objective == "phased":
        return Accelerator(name, "ddim", (int(told["num_paired_steps"]),))
    raise ConfigError(f"{file}: objective {objective!r} is not known; expected lcm or phased")


def read_accelerators(folder: Path, names: Sequence[str]) -> list[Accelerator]:
    return [read_accelerator(folder, name) for name in names]
