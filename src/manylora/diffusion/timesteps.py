"""Which training timesteps a sampler visits. Lists of ints; knows no tensors."""

import numpy as np

from manylora.errors import ConfigError


def solver_grid(num_solver_steps: int = 50, num_timesteps: int = 1000) -> list[int]:
    """Return the rising grid on which consistency is distilled: [19, 39, .., 999] for 50 of 1000.

    Source:
        Latent consistency models (Luo et al. 2023), section 4.3: skipping step k = num_timesteps // num_solver_steps.
    """
    if not 1 <= num_solver_steps <= num_timesteps:
        raise ConfigError(f"num_solver_steps must lie in [1, {num_timesteps}], got {num_solver_steps}")
    k = num_timesteps // num_solver_steps
    return [i * k - 1 for i in range(1, num_solver_steps + 1)]


def landing_grid(num_solver_steps: int = 50, num_timesteps: int = 1000) -> list[int]:
    """Return where a solver step from each point of `solver_grid` lands: [0, 19, .., 979].

    The first lands on timestep 0, whose alpha_bar[0] is below 1: the anchor holds the last trace of noise, and is the
    only place where data enter the distillation unchanged.
    """
    k = num_timesteps // num_solver_steps
    return [max(start - k, 0) for start in solver_grid(num_solver_steps, num_timesteps)]


def lcm_timesteps(
    num_steps: int, *, original_steps: int = 50, num_timesteps: int = 1000, strength: float = 1.0
) -> list[int]:
    """Return the falling timesteps of LCM sampling, all of them on the grid of the distillation.

    Args:
        strength: share of the grid to use, in (0, 1]; below 1 sampling starts from a picture, not from noise.
    Raises:
        ConfigError: more steps than the grid has.
    Source:
        Bit-equal to diffusers' LCMScheduler.
    """
    grid = solver_grid(original_steps, num_timesteps)[: int(original_steps * strength)]
    if not 1 <= num_steps <= len(grid):
        raise ConfigError(
            f"LCM steps must lie in [1, {len(grid)}] (original_steps {original_steps} x strength {strength:g}), "
            f"got {num_steps}"
        )
    # In floats, as diffusers does: i * len(grid) // num_steps differs from it for some lengths, such as 22 of 30.
    indices = np.floor(np.linspace(0, len(grid), num=num_steps, endpoint=False)).astype(np.int64)
    return [grid[::-1][index] for index in indices]


def trailing_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Return falling timesteps, evenly spaced, from the last one: [999, 979, .., 19] for 50 of 1000.

    Source:
        Common diffusion noise schedules and sample steps are flawed (Lin et al. 2024), table 2, "trailing".
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ConfigError(f"num_steps must lie in [1, {num_timesteps}], got {num_steps}")
    spacing = num_timesteps / num_steps
    # Float for float as diffusers does it, since ties hang on the last bit; but arange may give one point too many.
    points = np.arange(num_timesteps, 0, -spacing)[:num_steps]
    return [int(point) - 1 for point in points.round()]


def started_by(timesteps: list[int], strength: float) -> list[int]:
    """Return the part of falling timesteps that starts from a noised picture instead of from noise.

    Args:
        strength: share of the steps to run, in (0, 1]; at least one step is run.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength must lie in (0, 1], got {strength}")
    return timesteps[-max(1, int(len(timesteps) * strength)) :]
