"""How far the student is from the teacher: few steps of the one against the whole solver of the other.

Both start from the same noise. How many steps that pairing holds for the objective says: LCM sampling adds fresh noise
from the second on.
"""

# Shapes: P rows of the probe; latents are [P, 4, h, w].

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manylora.diffusion import (
    Denoiser,
    ddim_step,
    denoiser,
    guidance_weight,
    guided_denoiser,
    last_latent,
    solve,
)
from manylora.distill.networks import UnetStudent, UnetTeacher
from manylora.distill.objective import Objective
from manylora.distill.pictures import generator_at
from manylora.models.diffusion_base import Condition


@dataclass(frozen=True, eq=False)
class Probe:
    """Noise and conditions, and where the teacher's solver takes them."""

    noise: Tensor  # [P, 4, h, w]
    condition: Condition
    teacher_end: Tensor  # [P, 4, h, w]

    def paired_rmse(self, student_end: Tensor) -> float:
        """Return the root mean square of the difference to the teacher's latents, whose own spread is about 1."""
        return float((student_end - self.teacher_end).square().mean().sqrt())


class Sampling:
    """Teacher and student as samplers run them, at one guidance, a batch at a time."""

    def __init__(self, objective: Objective, batch: int) -> None:
        self.objective, self.batch = objective, batch

    @torch.no_grad()
    def teacher_end(self, teacher: UnetTeacher, noise: Tensor, condition: Condition) -> Tensor:
        """Return where the guided solver takes noise [P, 4, h, w], over all steps of the distillation's grid."""
        objective = self.objective
        timesteps = objective.start_t.flip(0).tolist()

        def denoise(condition: Condition) -> Denoiser:
            return guided_denoiser(
                lambda z, t: teacher(z, t, condition),
                objective.schedule,
                objective.prediction,
                objective.config.guidance_scale,
            )

        return self._in_batches(
            noise,
            condition,
            lambda z, c: last_latent(solve(denoise(c), objective.schedule, z, timesteps, ddim_step)),
        )

    @torch.no_grad()
    def student_end(
        self, student: UnetStudent, noise: Tensor, condition: Condition, num_steps: int, seed: int
    ) -> Tensor:
        """Return where the objective's sampler takes noise [P, 4, h, w]; what it adds between steps is drawn by the
        seed."""
        objective, schedule = self.objective, self.objective.schedule
        w = torch.full((self.batch,), guidance_weight(objective.config.guidance_scale))
        draw = generator_at(seed, 3)

        def end(z: Tensor, condition: Condition) -> Tensor:
            network = lambda z, t: student(z, t, condition, w[: len(z)])  # noqa: E731
            denoise = denoiser(network, schedule, objective.prediction)
            return objective.sample(
                denoise, z, num_steps, lambda z: torch.randn(z.shape, generator=draw).to(z)
            )

        return self._in_batches(noise, condition, end)

    def _in_batches(
        self, noise: Tensor, condition: Condition, sample: Callable[[Tensor, Condition], Tensor]
    ) -> Tensor:
        starts = range(0, len(noise), self.batch)
        parts = (slice(start, start + self.batch) for start in starts)
        return torch.cat([sample(noise[part], condition.rows(part)) for part in parts])


def starting_noise(num_rows: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Return [num_rows, *shape]; a row's noise does not depend on how many there are."""
    return torch.stack(
        [torch.randn(shape, generator=generator_at(seed, 2, row)) for row in range(num_rows)]
    )


def kept_tensor(path: Path, made_of: str, make: Callable[[], Tensor]) -> Tensor:
    """Return the tensor that `path` keeps, or make and keep it: the solver's way costs a hundred passes a row.

    Args:
        made_of: what it depends on; a file of something else is replaced.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_of") == made_of:
                return file.get_tensor("tensor")  # type: ignore[no-any-return]
    except (OSError, SafetensorError):
        pass  # not there, or cut short by a kill
    tensor = make()
    save_file({"tensor": tensor.cpu().contiguous()}, path, {"made_of": made_of})
    return tensor
