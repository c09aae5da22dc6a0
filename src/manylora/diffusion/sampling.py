"""From noise to data: the training-free samplers and the LCM sampler, as loops over a denoiser.

Both are generators of one record a step, so that who iterates decides what to keep, to show, or when to stop.
"""

# Shapes: B rows of a batch; latents are [B, ...].

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from manylora.diffusion.consistency import consistency
from manylora.diffusion.guidance import Denoiser
from manylora.diffusion.schedule import NoiseLevel, NoiseSchedule, add_noise
from manylora.diffusion.solvers import (
    PastStep,
    Solver,
    StepStart,
    dpm_solver_pp_2m_step,
    unipc_correction,
)
from manylora.errors import ConfigError

_FEW_STEPS = 15  # below this diffusers' DPM-Solver++ lets the last step look at no past, which steadies it

NoiseSource = Callable[[Tensor], Tensor]
"""Returns standard normal noise shaped like the latent it is given."""


@dataclass(frozen=True, eq=False)
class SamplingStep:
    """What one step of a sampler did."""

    t: int
    """The timestep at which the denoiser was asked."""
    x0: Tensor  # [B, ...]  the data as seen from there
    z: Tensor  # [B, ...]  the latent after the step


def solve(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    z: Tensor,
    timesteps: Sequence[int],
    solver: Solver,
    *,
    end: NoiseLevel | None = None,
) -> Iterator[SamplingStep]:
    """Follow the probability-flow ODE through the timesteps, one call of the denoiser each.

    The step from timesteps[i] goes to timesteps[i + 1], whatever their distance; the last goes to `end`.

    Args:
        z: [B, ...] latent at timesteps[0].
        timesteps: falling.
        end: level after the last step; None for that of timestep 0, alpha_bar[0] (diffusers'
            `set_alpha_to_one=False`, `final_sigmas_type="sigma_min"`), which is where distillation lands too.
    """
    _refuse_not_falling(timesteps)
    past: PastStep | None = None
    levels = [schedule.level(_rows(t, z), z) for t in timesteps]
    levels.append(schedule.level(_rows(0, z), z) if end is None else end)
    for i, t in enumerate(timesteps):
        now = denoise(z, _rows(t, z))
        z = solver(z, now, levels[i], levels[i + 1], None if _first_order(i, levels) else past)
        past = PastStep(now.x0, levels[i])
        yield SamplingStep(t, now.x0, z)


def unipc_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    z: Tensor,
    timesteps: Sequence[int],
    *,
    end: NoiseLevel | None = None,
) -> Iterator[SamplingStep]:
    """Follow the probability-flow ODE with UniPC-2: each step is corrected with what the network says at its end.

    The correction costs no call: the network is asked there anyway, for the next step. So the last step has none.

    Args:
        z: [B, ...] latent at timesteps[0].
        timesteps: falling.
        end: level after the last step; None for that of timestep 0, as in `solve`.
    Source:
        UniPC (Zhao et al. 2023), algorithm 1; equal to diffusers' UniPCMultistepScheduler, whose last step is of
        first order always.
    """
    _refuse_not_falling(timesteps)
    start: StepStart | None = None
    levels = [schedule.level(_rows(t, z), z) for t in timesteps]
    levels.append(schedule.level(_rows(0, z), z) if end is None else end)
    for i, t in enumerate(timesteps):
        now = denoise(z, _rows(t, z))
        if start is not None:
            z = unipc_correction(start, now.x0, levels[i])
        is_last = i == len(timesteps) - 1
        past = None if start is None or is_last else PastStep(start.x0, start.level)
        start = StepStart(z, now.x0, levels[i], past)
        z = dpm_solver_pp_2m_step(z, now, levels[i], levels[i + 1], past)
        yield SamplingStep(t, now.x0, z)


def lcm_sample(
    denoise: Denoiser, schedule: NoiseSchedule, z: Tensor, timesteps: Sequence[int], noise: NoiseSource
) -> Iterator[SamplingStep]:
    """Jump to the data with the consistency function, noise it again to the next timestep, and so on.

    Fresh noise enters before every step but the first, so only one step alone is a function of the first noise.

    Args:
        z: [B, ...] latent at timesteps[0].
        timesteps: falling, from `lcm_timesteps`.
        noise: asked once between two steps.
    Source:
        Multistep sampling of latent consistency models (Luo et al. 2023); equal to diffusers' LCMScheduler.
    """
    _refuse_not_falling(timesteps)
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        x0 = consistency(z, denoise(z, _rows(t, z)).x0, _rows(t, z))
        z = x0 if t_next is None else add_noise(x0, noise(x0), schedule.level(_rows(t_next, z), z))
        yield SamplingStep(t, x0, z)


def last_latent(steps: Iterable[SamplingStep]) -> Tensor:
    """Run a sampler to its end and return the latent there [B, ...]."""
    *_, last = steps
    return last.z


def _rows(t: int, z: Tensor) -> Tensor:
    """The timestep for every row: [B] int64."""
    return torch.full((len(z),), t, dtype=torch.int64, device=z.device)


def _first_order(i: int, levels: Sequence[NoiseLevel]) -> bool:
    """Whether step i must not look at the past: the last of few steps, or one to clean data (lambda is infinite)."""
    is_last = i == len(levels) - 2
    return is_last and (len(levels) - 1 < _FEW_STEPS or not bool(levels[-1].sigma.all()))


def _refuse_not_falling(timesteps: Sequence[int]) -> None:
    if not timesteps or any(later >= t for t, later in pairwise(timesteps)):
        raise ConfigError(f"timesteps must be at least one and fall, got {list(timesteps)}")
