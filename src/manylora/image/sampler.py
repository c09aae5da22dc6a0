"""Samplers by name: which timesteps each visits, and its loop. Knows no network."""

from collections.abc import Iterator

from torch import Tensor

from manylora.diffusion import (
    Denoiser,
    NoiseSchedule,
    NoiseSource,
    SamplingStep,
    clean_level,
    ddim_step,
    dpm_solver_pp_2m_step,
    euler_step,
    lcm_sample,
    lcm_timesteps,
    solve,
    started_by,
    trailing_timesteps,
    unipc_sample,
)
from manylora.errors import ConfigError, RequestError
from manylora.image.params import ImageParams


def timesteps_of(params: ImageParams, num_timesteps: int) -> tuple[int, ...]:
    """Return the falling timesteps at which the network will be asked.

    Raises:
        RequestError: more steps than the schedule, or the part of it that strength leaves, has.
    """
    try:
        if params.sampler == "lcm":
            strength = 1.0 if params.strength is None else params.strength
            steps, original = params.steps, params.original_steps
            if original > num_timesteps:
                raise RequestError(
                    f"image parameter original_steps: expected at most the base's {num_timesteps}, got {original}"
                )
            grid = lcm_timesteps(
                steps, original_steps=original, num_timesteps=num_timesteps, strength=strength
            )
            return tuple(grid)
        whole = trailing_timesteps(params.steps, num_timesteps)
    except ConfigError as error:
        raise RequestError(f"image parameter steps: {error}; ask for fewer, or another sampler") from None
    return tuple(whole if params.strength is None else started_by(whole, params.strength))


def sample(
    name: str,
    denoise: Denoiser,
    schedule: NoiseSchedule,
    z: Tensor,
    timesteps: tuple[int, ...],
    noise: NoiseSource,
) -> Iterator[SamplingStep]:
    """Run a sampler from the latent z [B, ...] at timesteps[0]; one call of the denoiser a step.

    Where each ends is what diffusers' scheduler of that name does by default for Stable Diffusion: DDIM at the first
    timestep of the schedule (`set_alpha_to_one=False`), the others at clean data.

    Args:
        noise: asked by lcm alone, once between two steps.
    """
    match name:
        case "lcm":
            return lcm_sample(denoise, schedule, z, timesteps, noise)
        case "ddim":
            return solve(denoise, schedule, z, timesteps, ddim_step)
        case "euler":
            return solve(denoise, schedule, z, timesteps, euler_step, end=clean_level(z))
        case "dpm-solver++":
            return solve(denoise, schedule, z, timesteps, dpm_solver_pp_2m_step, end=clean_level(z))
        case "unipc":
            return unipc_sample(denoise, schedule, z, timesteps, end=clean_level(z))
    raise AssertionError(f"params let the sampler {name!r} through")
