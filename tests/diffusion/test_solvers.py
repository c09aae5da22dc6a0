"""Solvers and samplers against diffusers, against each other, and against a flow known in closed form."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.testing import assert_close

from manylora.diffusion import (
    Denoised,
    NoiseLevel,
    NoiseSchedule,
    PastStep,
    Prediction,
    Solver,
    StepStart,
    clean_level,
    ddim_step,
    denoiser,
    dpm_solver_pp_2m_step,
    euler_step,
    last_latent,
    lcm_sample,
    lcm_timesteps,
    solve,
    trailing_timesteps,
    unipc_correction,
    unipc_sample,
)
from manylora.errors import ConfigError

# diffusers hands tensors to numpy in a way that numpy 2 has announced to end.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULE = NoiseSchedule.scaled_linear()
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SOLVERS = {"ddim": ddim_step, "euler": euler_step, "dpm-solver++(2M)": dpm_solver_pp_2m_step}


def network(z: Tensor, t: Tensor) -> Tensor:
    """Some network: not linear in z, and different at each timestep."""
    return torch.tanh(z * 1.3 + t.reshape(-1, 1, 1, 1) / 1000)


def diffusers_result(scheduler: Any, z: Tensor, num_steps: int) -> Tensor:
    """What the scheduler makes of a latent with unit variance."""
    scheduler.set_timesteps(num_steps)
    # Schedulers on sigmas want z / signal, which their own starting noise is scaled to.
    if isinstance(scheduler, EulerDiscreteScheduler):
        z = z * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        rows = torch.full((len(z),), int(t))
        output = network(scheduler.scale_model_input(z, t), rows)
        z = scheduler.step(output, t, z).prev_sample
    if isinstance(scheduler, EulerDiscreteScheduler):
        z = z / (scheduler.sigmas[-1] ** 2 + 1) ** 0.5
    return z


def ours(solver: Solver, z: Tensor, num_steps: int, kind: Prediction, clean: bool) -> Tensor:
    denoise = denoiser(network, SCHEDULE, kind)
    end = clean_level(z) if clean else None
    return last_latent(solve(denoise, SCHEDULE, z, trailing_timesteps(num_steps), solver, end=end))


@pytest.mark.parametrize("kind", Prediction)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 20, 50])
def test_ddim_is_diffusers(num_steps, kind):
    """For step numbers that divide 1000; for others diffusers' DDIM steps past its own list."""
    z = torch.randn(2, 4, 8, 8)
    for clean in (False, True):
        scheduler = DDIMScheduler(
            **BETAS,
            timestep_spacing="trailing",
            set_alpha_to_one=clean,
            prediction_type=kind.value,
            clip_sample=False,
        )
        found = ours(ddim_step, z, num_steps, kind, clean)
        assert not torch.allclose(found, z, atol=0.1)
        assert_close(found, diffusers_result(scheduler, z, num_steps), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", [Prediction.EPSILON, Prediction.V])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 8, 32, 50])
def test_euler_is_diffusers(num_steps, kind):
    z = torch.randn(2, 4, 8, 8)
    for clean in (False, True):
        scheduler = EulerDiscreteScheduler(
            **BETAS,
            timestep_spacing="trailing",
            final_sigmas_type="zero" if clean else "sigma_min",
            prediction_type=kind.value,
        )
        found = ours(euler_step, z, num_steps, kind, clean)
        assert_close(found, diffusers_result(scheduler, z, num_steps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", Prediction)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 8, 14, 15, 32, 50])
def test_dpm_solver_is_diffusers(num_steps, kind):
    z = torch.randn(2, 4, 8, 8)
    for clean in (False, True):
        scheduler = DPMSolverMultistepScheduler(
            **BETAS,
            timestep_spacing="trailing",
            final_sigmas_type="zero" if clean else "sigma_min",
            prediction_type=kind.value,
        )
        found = ours(dpm_solver_pp_2m_step, z, num_steps, kind, clean)
        if num_steps > 2:
            assert not torch.allclose(found, ours(ddim_step, z, num_steps, kind, clean), atol=1e-3)
        assert_close(found, diffusers_result(scheduler, z, num_steps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", Prediction)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 8, 14, 15, 32, 50])
def test_unipc_is_diffusers(num_steps, kind):
    z = torch.randn(2, 4, 8, 8)
    for clean in (False, True):
        scheduler = UniPCMultistepScheduler(
            **BETAS,
            solver_order=2,
            solver_type="bh2",
            timestep_spacing="trailing",
            final_sigmas_type="zero" if clean else "sigma_min",
            prediction_type=kind.value,
        )
        timesteps, end = trailing_timesteps(num_steps), clean_level(z) if clean else None
        found = last_latent(
            unipc_sample(denoiser(network, SCHEDULE, kind), SCHEDULE, z, timesteps, end=end)
        )
        # Two steps to clean data are those of any of these solvers; after fifty all have come together.
        if 2 < num_steps < 50:
            assert not torch.allclose(
                found, ours(dpm_solver_pp_2m_step, z, num_steps, kind, clean), atol=1e-3
            )
        assert_close(found, diffusers_result(scheduler, z, num_steps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", Prediction)
@pytest.mark.parametrize("num_steps", range(1, 9))
def test_lcm_sampling_is_diffusers(num_steps, kind):
    z = torch.randn(2, 4, 8, 8)
    scheduler = LCMScheduler(**BETAS, prediction_type=kind.value)
    scheduler.set_timesteps(num_steps)
    generator, theirs = torch.Generator().manual_seed(1), z
    for t in scheduler.timesteps:
        output = network(theirs, torch.full((2,), int(t)))
        theirs = scheduler.step(output, t, theirs, generator=generator).prev_sample
    again = torch.Generator().manual_seed(1)
    steps = lcm_sample(
        denoiser(network, SCHEDULE, kind),
        SCHEDULE,
        z,
        lcm_timesteps(num_steps),
        lambda like: torch.randn(like.shape, generator=again),
    )
    assert_close(last_latent(steps), theirs, atol=2e-5, rtol=2e-5)


def test_euler_is_ddim_in_other_coordinates():
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    euler, ddim = (ours(solver, z, 10, Prediction.V, False) for solver in (euler_step, ddim_step))
    assert_close(euler, ddim, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", SOLVERS)
def test_data_that_are_one_point_need_one_step(name):
    point = torch.randn(1, 4, 8, 8, dtype=torch.float64)

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        level = SCHEDULE.level(t, z)
        return Denoised(point.expand_as(z), (z - level.signal * point) / level.sigma)

    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for num_steps in (1, 3, 20):
        steps = solve(
            denoise, SCHEDULE, z, trailing_timesteps(num_steps), SOLVERS[name], end=clean_level(z)
        )
        assert_close(last_latent(steps), point.expand_as(z))


STD = 0.5
"""Spread of the Gaussian data whose flow is known."""


def gaussian_denoised(z: Tensor, level: NoiseLevel) -> Denoised:
    """The exact denoiser of N(0, STD^2) data."""
    variance = level.signal**2 * STD**2 + level.sigma**2
    return Denoised(level.signal * STD**2 / variance * z, level.sigma / variance * z)


def level_at(log_snr: float) -> NoiseLevel:
    signal = torch.tensor([[2 * log_snr]], dtype=torch.float64).sigmoid().sqrt()
    return NoiseLevel(signal, (1 - signal**2).sqrt())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("dpm-solver++(2M)", 2)])
def test_the_error_falls_by_the_solvers_order(name, order):
    """On the exact flow of a Gaussian, z(t) / z(s) = std of z(t) / std of z(s), in even steps of lambda."""
    errors = []
    for num_steps in (32, 64, 128):
        levels = [level_at(-2.5 + 5.5 * i / num_steps) for i in range(num_steps + 1)]
        z, past = torch.ones(1, 1, dtype=torch.float64), None
        for level, to in pairwise(levels):
            now = gaussian_denoised(z, level)
            z, past = SOLVERS[name](z, now, level, to, past), PastStep(now.x0, level)
        first, last = (
            (level.signal**2 * STD**2 + level.sigma**2) ** 0.5 for level in (levels[0], levels[-1])
        )
        errors.append((z * first / last - 1).abs().item())
    falls = [before / after for before, after in pairwise(errors)]
    assert errors[0] > 1e-4
    assert all(0.9 < fall / 2**order < 1.15 for fall in falls), (errors, falls)


def test_the_corrected_step_is_a_whole_order_better():
    errors = []
    for num_steps in (32, 64, 128):
        levels = [level_at(-2.5 + 5.5 * i / num_steps) for i in range(num_steps + 1)]
        z = torch.ones(1, 1, dtype=torch.float64)
        start: StepStart | None = None
        for level, to in pairwise(levels):
            now = gaussian_denoised(z, level)
            if start is not None:
                z = unipc_correction(start, now.x0, level)
            past = None if start is None else PastStep(start.x0, start.level)
            start = StepStart(z, now.x0, level, past)
            z = dpm_solver_pp_2m_step(z, now, level, to, past)
        assert start is not None
        z = unipc_correction(start, gaussian_denoised(z, levels[-1]).x0, levels[-1])
        first, last = (
            (level.signal**2 * STD**2 + level.sigma**2) ** 0.5 for level in (levels[0], levels[-1])
        )
        errors.append((z * first / last - 1).abs().item())
    falls = [before / after for before, after in pairwise(errors)]
    assert errors[0] > 1e-6
    assert all(0.8 < fall / 2**3 < 1.25 for fall in falls), (errors, falls)


def exact_gaussian(z: Tensor, t: Tensor) -> Denoised:
    return gaussian_denoised(z, SCHEDULE.level(t, z))


def test_each_step_is_told():
    z = torch.randn(2, 3)
    steps = list(solve(exact_gaussian, SCHEDULE, z, [999, 499], ddim_step))
    assert [step.t for step in steps] == [999, 499]
    assert_close(steps[0].x0, exact_gaussian(z, torch.tensor([999, 999])).x0)
    assert not torch.allclose(steps[0].z, steps[1].z)


@pytest.mark.parametrize("timesteps", [[], [499, 999], [999, 999]])
def test_timesteps_that_do_not_fall_are_refused(timesteps):
    with pytest.raises(ConfigError, match="fall"):
        last_latent(solve(exact_gaussian, SCHEDULE, torch.randn(2, 3), timesteps, ddim_step))
    with pytest.raises(ConfigError, match="fall"):
        last_latent(lcm_sample(exact_gaussian, SCHEDULE, torch.randn(2, 3), timesteps, torch.randn_like))
