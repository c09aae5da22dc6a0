"""What every objective shares, and latent consistency distillation: the loss of one train step, for any student and
any teacher. `phased` has the other objective.

Knows schedules and latents. Knows no UNet, adapter, optimizer or file: the trainer for real models and the tests whose
answer is known in closed form both call `loss`, and nothing else here is theirs to repeat.
"""

# Shapes: B rows of a batch, S solver steps of the grid; latents are [B, ...].

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from manylora.diffusion import (
    Denoiser,
    NoiseLevel,
    NoiseSchedule,
    NoiseSource,
    Prediction,
    add_noise,
    consistency,
    ddim_step,
    denoised_from,
    guidance_weight,
    guide,
    landing_grid,
    last_latent,
    lcm_sample,
    lcm_timesteps,
    solver_grid,
)
from manylora.errors import ConfigError

ConditionT_contra = TypeVar("ConditionT_contra", contravariant=True)


class Student(Protocol[ConditionT_contra]):
    """A network with the weights that learn (or with their average)."""

    def __call__(self, z: Tensor, t: Tensor, condition: ConditionT_contra, w: Tensor) -> Tensor:
        """Return the output [B, ...] at z [B, ...], t [B] int64.

        Args:
            w: [B] guidance weight of each row, guidance_scale - 1. A student of one fixed w ignores it.
        """
        ...


class Teacher(Protocol[ConditionT_contra]):
    """The frozen network, with and without the condition."""

    def __call__(self, z: Tensor, t: Tensor, condition: ConditionT_contra) -> tuple[Tensor, Tensor]:
        """Return the outputs (conditional, unconditional), each [B, ...]; in one pass of 2 B rows, if it can."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    guidance_scale: float = 8.5
    """Guidance that is distilled into the student; 8.5 is w = 7.5, that of the published LCM-LoRAs."""

    max_guidance_scale: float | None = None
    """If given, each row's guidance is drawn evenly from guidance_scale to this. The student must then be conditioned
    on w: one that does not see it learns an average over all w."""

    num_solver_steps: int = 50
    """Steps of the teacher's DDIM solver that the student's one step stands for."""

    loss: Literal["huber", "l2"] = "huber"
    """huber is sqrt(d^2 + c^2) - c for each element d of the difference, l2 is d^2; both are averaged."""

    huber_c: float = 0.001
    """Difference at which huber turns from square to linear."""

    def __post_init__(self) -> None:
        if self.guidance_scale < 1.0:
            raise ConfigError(
                f"guidance_scale must be at least 1 (no guidance), got {self.guidance_scale}; it is w + 1"
            )
        if self.max_guidance_scale is not None and self.max_guidance_scale <= self.guidance_scale:
            raise ConfigError(
                f"max_guidance_scale must be above guidance_scale = {self.guidance_scale}, "
                f"got {self.max_guidance_scale}"
            )
        if self.loss not in ("huber", "l2"):
            raise ConfigError(f"loss must be huber or l2, got {self.loss!r}")
        if self.huber_c <= 0:
            raise ConfigError(f"huber_c must be positive, got {self.huber_c}")


@dataclass(frozen=True, eq=False)
class Draw:
    """What chance decides about one train step."""

    index: Tensor  # [B]  int64 in [0, S), the solver step of each row
    noise: Tensor  # [B, ...]
    w: Tensor  # [B]  guidance_scale - 1


class Objective(ABC):
    """What a student learns from a teacher's guided DDIM solver, and how it is then asked for pictures."""

    num_paired_steps: int
    """Steps of `sample` after which the student ends where the teacher's solver ends from the same noise."""

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        config: ObjectiveConfig,
        start_t: Sequence[int],
        landing_t: Sequence[int],
    ) -> None:
        self.schedule, self.prediction, self.config = schedule, prediction, config
        self.start_t = torch.tensor(start_t)  # [S]  rising
        self.landing_t = torch.tensor(landing_t)  # [S]

    @abstractmethod
    def loss(
        self,
        student: Student[ConditionT_contra],
        teacher: Teacher[ConditionT_contra],
        target_student: Student[ConditionT_contra],
        latents: Tensor,
        condition: ConditionT_contra,
        draw: Draw,
    ) -> Tensor:
        """Return the loss of one train step, differentiable in the student's weights alone.

        Args:
            target_student: the student itself, or the average of its weights.
            latents: [B, ...] clean latents; whatever their dtype, everything outside the networks is fp32 at least.
            condition: handed to the networks as it is.
        """

    @abstractmethod
    def sample(self, denoise: Denoiser, z: Tensor, num_steps: int, noise: NoiseSource) -> Tensor:
        """Return the latents [B, ...] that a student reaches from noise z [B, ...], as its sampler asks it.

        Args:
            denoise: the student, unguided.
        """

    def draw(self, latents: Tensor, generator: torch.Generator | None = None) -> Draw:
        """Draw solver step, noise and guidance of every row. The generator lives on the CPU, so a seed draws the same
        on any device."""
        num_rows = len(latents)
        index = self._draw_index(num_rows, generator)
        noise = torch.randn(latents.shape, generator=generator, dtype=precise_dtype(latents))
        low, high = self.config.guidance_scale, self.config.max_guidance_scale
        share = torch.rand(num_rows, generator=generator, dtype=precise_dtype(latents))
        w = guidance_weight(low) + share * (0.0 if high is None else high - low)
        return Draw(index.to(latents.device), noise.to(latents.device), w.to(latents.device))

    def _draw_index(self, num_rows: int, generator: torch.Generator | None) -> Tensor:  # [B]
        return torch.randint(self.config.num_solver_steps, (num_rows,), generator=generator)

    def _solver_step(
        self,
        teacher: Teacher[ConditionT_contra],
        z: Tensor,
        t: Tensor,
        t_landing: Tensor,
        condition: ConditionT_contra,
        w: Tensor,
    ) -> Tensor:
        """One guided DDIM step of the teacher, to the point of the grid before; the first lands on alpha_bar[0]."""
        level, to = self.schedule.level(t, z), self.schedule.level(t_landing, z)
        conditional, unconditional = (
            denoised_from(output, z, level, self.prediction) for output in teacher(z, t, condition)
        )
        return ddim_step(z, guide(conditional, unconditional, by_row(w, z)), level, to)

    def _distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        difference = found - wanted
        if self.config.loss == "l2":
            return difference.square().mean()
        # Pseudo-Huber, as in improved consistency training (Song & Dhariwal 2024), by element as LCM has it.
        c = self.config.huber_c
        return ((difference.square() + c**2).sqrt() - c).mean()


class ConsistencyObjective(Objective):
    """The student's end of the trajectory at one solver step equals its own (or its average's) a step further down.

    Source:
        Latent consistency models (Luo et al. 2023), algorithm 1; LCM-LoRA (Luo et al. 2023) leaves out the average.
    """

    num_paired_steps = 1  # LCM sampling adds noise of its own before a second one

    def __init__(self, schedule: NoiseSchedule, prediction: Prediction, config: ObjectiveConfig) -> None:
        grids = (
            grid(config.num_solver_steps, schedule.num_timesteps) for grid in (solver_grid, landing_grid)
        )
        super().__init__(schedule, prediction, config, *grids)

    def loss(
        self,
        student: Student[ConditionT_contra],
        teacher: Teacher[ConditionT_contra],
        target_student: Student[ConditionT_contra],
        latents: Tensor,
        condition: ConditionT_contra,
        draw: Draw,
    ) -> Tensor:
        latents = latents.to(precise_dtype(latents))
        t, t_landing = (
            grid.to(latents.device)[draw.index] for grid in (self.start_t, self.landing_t)
        )  # [B]
        level = self.schedule.level(t, latents)
        z = add_noise(latents, draw.noise, level)
        # The target comes first: it keeps no graph, so its memory is free again when the student's is taken.
        with torch.no_grad():
            z_landing = self._solver_step(teacher, z, t, t_landing, condition, draw.w)
            landed = self._end(target_student, z_landing, t_landing, condition, draw.w)
        return self._distance(self._end(student, z, t, condition, draw.w), landed)

    def sample(self, denoise: Denoiser, z: Tensor, num_steps: int, noise: NoiseSource) -> Tensor:
        timesteps = lcm_timesteps(
            num_steps,
            original_steps=self.config.num_solver_steps,
            num_timesteps=self.schedule.num_timesteps,
        )
        return last_latent(lcm_sample(denoise, self.schedule, z, timesteps, noise))

    def _end(
        self,
        student: Student[ConditionT_contra],
        z: Tensor,
        t: Tensor,
        condition: ConditionT_contra,
        w: Tensor,
    ) -> Tensor:
        """Where the student sees the end of the trajectory through z: its consistency function [B, ...]."""
        level: NoiseLevel = self.schedule.level(t, z)
        return consistency(z, denoised_from(student(z, t, condition, w), z, level, self.prediction).x0, t)


def by_row(w: Tensor, z: Tensor) -> Tensor:
    """w [B] shaped to broadcast against z [B, ...]."""
    return w.reshape(-1, *[1] * (z.dim() - 1))


def precise_dtype(latents: Tensor) -> torch.dtype:
    """Return the dtype of everything outside the networks: fp32 at least."""
    return torch.promote_types(latents.dtype, torch.float32)
