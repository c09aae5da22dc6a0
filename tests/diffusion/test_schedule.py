"""The schedule equals diffusers', and refuses what it does not have."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch.testing import assert_close

from manylora.diffusion import NoiseSchedule, add_noise, clean_level
from manylora.errors import ConfigError

CONFIGS: dict[str, dict[str, Any]] = {
    "stable diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "ddpm, all defaults": {},
    "shorter": {"beta_schedule": "scaled_linear", "num_train_timesteps": 300},
    "betas given": {"trained_betas": [0.1, 0.2, 0.4]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_alpha_bar_is_diffusers_to_the_bit(name):
    scheduler = DDIMScheduler(**CONFIGS[name])
    ours = NoiseSchedule.from_diffusers(dict(scheduler.config)).alpha_bar
    assert ours[0] != ours[-1]
    assert torch.equal(ours, scheduler.alphas_cumprod.double())


def test_the_default_is_stable_diffusion():
    config = CONFIGS["stable diffusion"]
    assert torch.equal(
        NoiseSchedule.scaled_linear().alpha_bar, NoiseSchedule.from_diffusers(config).alpha_bar
    )
    assert NoiseSchedule.scaled_linear().alpha_bar[0].item() == pytest.approx(0.99915)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 1.5]}, "betas"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(config, named):
    with pytest.raises(ConfigError, match=named):
        NoiseSchedule.from_diffusers(config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_level_fits_its_latent(dtype):
    schedule, z = NoiseSchedule.scaled_linear(), torch.randn(3, 4, 8, 8).to(dtype)
    level = schedule.level(torch.tensor([0, 499, 999]), z)
    assert level.signal.shape == level.sigma.shape == (3, 1, 1, 1)
    assert level.signal.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert level.signal[0] > 0.99 > 0.1 > level.signal[2]
    assert_close(level.signal**2 + level.sigma**2, torch.ones_like(level.signal))


def test_noise_is_added_as_diffusers_adds_it():
    scheduler, schedule = DDIMScheduler(**CONFIGS["stable diffusion"]), NoiseSchedule.scaled_linear()
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 499, 999])
    ours = add_noise(x0, noise, schedule.level(t, x0))
    assert not torch.allclose(ours, x0)
    assert_close(ours, scheduler.add_noise(x0, noise, t))
    assert torch.equal(add_noise(x0, noise, clean_level(x0)), x0)
