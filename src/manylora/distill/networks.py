"""A learner as the objective asks for it: as the student and as the teacher, conditions of texts inside."""

# Shapes: B rows of a batch, h and w latent pixels.

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from manylora.distill.ema import EmaWeights
from manylora.distill.learners import Learner
from manylora.models.diffusion_base import Condition, run_unet, run_unet_pair

if TYPE_CHECKING:
    from accelerate import Accelerator


class UnetStudent:
    """The UNet with what it has learnt."""

    def __init__(self, learner: Learner, accelerator: Accelerator) -> None:
        self.learner, self.accelerator = learner, accelerator

    def __call__(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:  # [B, 4, h, w]
        self.learner.set_w(w)
        with self.accelerator.autocast():
            return run_unet(self.learner.unet, z, t, condition)


class AveragedStudent:
    """The same with the average of what it has learnt."""

    def __init__(self, student: UnetStudent, ema: EmaWeights) -> None:
        self.student, self.ema = student, ema

    def __call__(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:  # [B, 4, h, w]
        with self.in_use():
            return self.student(z, t, condition, w)

    def in_use(self) -> AbstractContextManager[None]:
        return self.ema.in_use()


class UnetTeacher:
    """The UNet as it was, with its condition and without, both in one pass.

    Args:
        unconditional: one row.
    """

    def __init__(self, learner: Learner, unconditional: Condition, accelerator: Accelerator) -> None:
        self.learner, self.unconditional, self.accelerator = learner, unconditional, accelerator

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        with self.learner.teacher() as unet, self.accelerator.autocast():
            return run_unet_pair(unet, z, t, condition, self.unconditional)
