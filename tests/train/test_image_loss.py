"""The denoising loss against its formulas and against diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from manylora.diffusion import NoiseSchedule, Prediction, add_noise, denoised_from, output_from
from manylora.train.image_loss import draw, even_draw, generator_for, min_snr_weights, picture_losses

SCHEDULE = NoiseSchedule.scaled_linear()
THEIRS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("kind", [Prediction.EPSILON, Prediction.V])
def test_the_loss_is_the_error_of_what_diffusers_calls_the_target(kind):
    latents, noise, output = torch.randn(3, 5, 4, 2, 2).unbind(0)
    timesteps = torch.tensor([0, 10, 500, 900, 999])
    level = SCHEDULE.level(timesteps, latents)
    wanted = noise if kind is Prediction.EPSILON else THEIRS.get_velocity(latents, noise, timesteps)
    losses = picture_losses(output, latents, noise, level, kind)
    torch.testing.assert_close(losses, (output - wanted).square().mean((1, 2, 3)), atol=1e-4, rtol=1e-4)
    assert picture_losses(wanted, latents, noise, level, kind).max() < 1e-8


@pytest.mark.parametrize("kind", list(Prediction))
def test_min_snr_makes_every_loss_that_on_the_data_times_the_capped_snr(kind):
    """Whatever the output means, the weighted loss is min(SNR, gamma) times the error of x0."""
    latents, noise, output = torch.randn(3, 4, 4, 2, 2, dtype=torch.float64).unbind(0)
    timesteps = torch.tensor([5, 200, 600, 980])
    level = SCHEDULE.level(timesteps, latents)
    z = add_noise(latents, noise, level)
    snr = compute_snr(THEIRS, timesteps).double()
    assert snr.min() < 5 < snr.max(), "both sides of the cap"
    losses = picture_losses(output, latents, noise, level, kind) * min_snr_weights(level, kind, 5.0)
    x0_error = (denoised_from(output, z, level, kind).x0 - latents).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, snr.clamp(max=5.0) * x0_error, atol=0, rtol=1e-4)


def test_the_wanted_output_says_latents_and_noise():
    latents, noise = torch.randn(2, 3, 4, 2, 2).unbind(0)
    level = SCHEDULE.level(torch.tensor([3, 400, 990]), latents)
    for kind in Prediction:
        said = denoised_from(
            output_from(
                denoised_from(noise, add_noise(latents, noise, level), level, Prediction.EPSILON),
                level,
                kind,
            ),
            add_noise(latents, noise, level),
            level,
            kind,
        )
        torch.testing.assert_close(said.epsilon, noise, atol=1e-3, rtol=1e-3)


def test_draws_are_those_of_their_place():
    latents = torch.zeros(400, 4, 1, 1)
    one, same, other = (
        draw(latents, SCHEDULE, 0.25, generator_for(0, "step", step, 0)) for step in (7, 7, 8)
    )
    assert torch.equal(one.noise, same.noise)
    assert torch.equal(one.timesteps, same.timesteps)
    assert not torch.equal(one.noise, other.noise)
    assert 0.15 < one.is_dropped.float().mean() < 0.35
    assert one.timesteps.min() < 20
    assert one.timesteps.max() > 980


def test_a_judging_draw_covers_all_timesteps_and_drops_no_caption():
    latents = torch.zeros(10, 4, 1, 1)
    draws = [even_draw(latents, SCHEDULE, turn / 4, generator_for(0, turn)) for turn in range(4)]
    assert not any(chance.is_dropped.any() for chance in draws)
    assert torch.cat([chance.timesteps for chance in draws]).sort().values.tolist() == list(
        range(0, 1000, 25)
    )
