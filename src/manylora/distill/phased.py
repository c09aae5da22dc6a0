"""Phased distillation: the trajectory is cut into phases, and the student jumps to the start of the one it stands in.

A jump over a fourth of the way is easier to learn than one over all of it, and N jumps in a row need no fresh noise:
sampling is deterministic, so that the student in N steps ends where the teacher's solver does from the same noise.
"""

# Shapes: B rows of a batch, S solver steps of the grid, N phases of S / N solver steps each; latents are [B, ...].

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.diffusion import (
    Denoiser,
    NoiseSchedule,
    NoiseSource,
    Prediction,
    add_noise,
    ddim_step,
    denoised_from,
    last_latent,
    solve,
    trailing_timesteps,
)
from manylora.distill.objective import (
    ConditionT_contra,
    Draw,
    Objective,
    ObjectiveConfig,
    Student,
    Teacher,
    by_row,
    precise_dtype,
)
from manylora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasedConfig(ObjectiveConfig):
    phases: int = 4
    """Parts of the trajectory, of equally many solver steps; the student samples in as many steps."""

    teacher_steps: int | None = None
    """Solver steps that the teacher walks towards the phase's start; the target is the jump of the student (or of its
    average) from where it stops. 1 is phased consistency. None: all of the phase, from its end, so that the target is
    the teacher's alone: dearer by the walk, and no error of the student enters it."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots make a class of their own, which super() does not know
        if self.phases < 1 or self.num_solver_steps % self.phases:
            near = self.num_solver_steps - self.num_solver_steps % max(self.phases, 1)
            raise ConfigError(
                f"phases must divide num_solver_steps, got {self.phases} phases of {self.num_solver_steps} steps"
                + (f"; near are {near} and {near + self.phases} steps" if self.phases > 0 else "")
            )
        if self.teacher_steps is not None and not 1 <= self.teacher_steps <= self.steps_of_a_phase:
            raise ConfigError(
                f"teacher_steps must lie in [1, {self.steps_of_a_phase}], the solver steps of a phase, "
                f"got {self.teacher_steps}"
            )

    @property
    def steps_of_a_phase(self) -> int:
        return self.num_solver_steps // self.phases


class PhasedObjective(Objective):
    """The student's jump to the start of its phase equals where the teacher's solver walks.

    The jump is one DDIM step with what the student predicts. At the phase's start it is the identity, whatever the
    student says, so no boundary condition is needed, and the last one lands on alpha_bar[0] as the solver does.

    Source:
        Phased consistency models (Wang et al. 2024), section 3.1, for teacher_steps = 1 without its adversarial loss;
        for all steps of a phase, progressive distillation (Salimans & Ho 2022) of many steps at once.
    """

    def __init__(self, schedule: NoiseSchedule, prediction: Prediction, config: PhasedConfig) -> None:
        num_steps, num_timesteps = config.num_solver_steps, schedule.num_timesteps
        start = trailing_timesteps(num_steps, num_timesteps)[::-1]
        # Where S does not divide the timesteps, rounding may put a phase's end beside the sampler's own timestep.
        ends = trailing_timesteps(config.phases, num_timesteps)[::-1]
        start[config.steps_of_a_phase - 1 :: config.steps_of_a_phase] = ends
        super().__init__(schedule, prediction, config, start, [0, *start[:-1]])
        self.num_paired_steps = config.phases
        self.teacher_steps, self.steps_of_a_phase = config.teacher_steps, config.steps_of_a_phase
        first = torch.arange(num_steps) // self.steps_of_a_phase * self.steps_of_a_phase
        self.phase_start_t = self.landing_t[first]
        """[S]  where the jump from each point of the grid ends."""

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
        t, end_t = (
            grid.to(latents.device)[draw.index] for grid in (self.start_t, self.phase_start_t)
        )  # [B]
        z = add_noise(latents, draw.noise, self.schedule.level(t, latents))
        with torch.no_grad():
            z_stop, t_stop = self._walk(teacher, z, draw.index, condition, draw.w)
            if bool((t_stop > end_t).any()):
                z_stop = self._jump(target_student, z_stop, t_stop, end_t, condition, draw.w)
        # An error in z grows with the signal on the rest of the way, so that the early phases' weigh the most at its
        # end; in z / signal, in which the trajectory bends least, all weigh alike.
        signal = self.schedule.level(end_t, z).signal
        found = self._jump(student, z, t, end_t, condition, draw.w)
        return self._distance(found / signal, z_stop / signal)

    def sample(self, denoise: Denoiser, z: Tensor, num_steps: int, noise: NoiseSource) -> Tensor:
        timesteps = trailing_timesteps(num_steps, self.schedule.num_timesteps)
        return last_latent(solve(denoise, self.schedule, z, timesteps, ddim_step))

    def _draw_index(self, num_rows: int, generator: torch.Generator | None) -> Tensor:  # [B]
        """Draw each row's solver step; a teacher that walks all of a phase sets out from its end alone, where the
        sampler asks."""
        if self.teacher_steps is not None:
            return super()._draw_index(num_rows, generator)
        phase = torch.randint(self.num_paired_steps, (num_rows,), generator=generator)
        return phase * self.steps_of_a_phase + self.steps_of_a_phase - 1

    def _walk(
        self,
        teacher: Teacher[ConditionT_contra],
        z: Tensor,
        index: Tensor,
        condition: ConditionT_contra,
        w: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Where the teacher's walk from each row's solver step stops, [B, ...] and its timesteps [B].

        No row walks out of its phase. One that has fewer steps left than others is asked along with them and stays.
        """
        start_t, landing_t = self.start_t.to(z.device), self.landing_t.to(z.device)
        left, t = index % self.steps_of_a_phase + 1, start_t[index]  # [B]
        most = int(left.max())
        for walked in range(most if self.teacher_steps is None else min(self.teacher_steps, most)):
            is_on, at = left > walked, (index - walked).clamp(min=0)
            stepped = self._solver_step(teacher, z, t, landing_t[at], condition, w)
            z = torch.where(by_row(is_on, z), stepped, z)
            t = torch.where(is_on, landing_t[at], t)
        return z, t

    def _jump(
        self,
        student: Student[ConditionT_contra],
        z: Tensor,
        t: Tensor,
        end_t: Tensor,
        condition: ConditionT_contra,
        w: Tensor,
    ) -> Tensor:
        """One DDIM step from t to end_t, with what the student predicts at z; where both are one it goes nowhere."""
        level, to = self.schedule.level(t, z), self.schedule.level(end_t, z)
        return ddim_step(
            z, denoised_from(student(z, t, condition, w), z, level, self.prediction), level, to
        )
