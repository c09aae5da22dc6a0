"""Taking a latent apart by each kind of output, and guidance."""

import pytest
import torch
from torch.testing import assert_close

from manylora.diffusion import (
    Denoised,
    NoiseSchedule,
    Prediction,
    add_noise,
    denoised_from,
    denoiser,
    guidance_weight,
    guide,
    guided_denoiser,
    output_from,
)
from manylora.errors import ConfigError

SCHEDULE = NoiseSchedule.scaled_linear()


def draw() -> tuple[Denoised, torch.Tensor, torch.Tensor]:
    """Data, noise, the latent that they make, and its timesteps; fp64."""
    truth = Denoised(torch.randn(5, 3, 2, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64))
    t = torch.tensor([0, 19, 499, 979, 999])
    return truth, add_noise(truth.x0, truth.epsilon, SCHEDULE.level(t, truth.x0)), t


@pytest.mark.parametrize("kind", Prediction)
def test_the_true_output_gives_back_data_and_noise(kind):
    truth, z, t = draw()
    level = SCHEDULE.level(t, z)
    output = output_from(truth, level, kind)
    found = denoised_from(output, z, level, kind)
    assert_close(found.x0, truth.x0)
    assert_close(found.epsilon, truth.epsilon)
    wrong = denoised_from(output + 1, z, level, kind)
    assert not torch.allclose(wrong.x0, truth.x0)


@pytest.mark.parametrize("kind", Prediction)
def test_any_output_takes_the_latent_apart_exactly(kind):
    _, z, t = draw()
    level = SCHEDULE.level(t, z)
    found = denoised_from(torch.randn_like(z), z, level, kind)
    assert_close(add_noise(found.x0, found.epsilon, level), z)


def test_half_precision_outputs_are_widened_first():
    _, z, t = draw()
    found = denoised_from(z.half(), z.float(), SCHEDULE.level(t, z.float()), Prediction.V)
    assert found.x0.dtype == found.epsilon.dtype == torch.float32


def test_the_kind_comes_from_a_scheduler_config():
    assert Prediction.from_diffusers({"prediction_type": "v_prediction"}) is Prediction.V
    assert Prediction.from_diffusers({}) is Prediction.EPSILON
    with pytest.raises(ConfigError, match="flow_prediction"):
        Prediction.from_diffusers({"prediction_type": "flow_prediction"})


@pytest.mark.parametrize("kind", Prediction)
def test_guiding_what_is_denoised_is_guiding_the_output(kind):
    """Pipelines guide the network's output by uncond + guidance_scale * (cond - uncond): the same thing."""
    _, z, t = draw()
    conditional, unconditional = torch.randn_like(z), torch.randn_like(z)
    ours = guided_denoiser(lambda z, t: (conditional, unconditional), SCHEDULE, kind, 7.5)(z, t)
    output = unconditional + 7.5 * (conditional - unconditional)
    theirs = denoiser(lambda z, t: output, SCHEDULE, kind)(z, t)
    assert not torch.allclose(ours.x0, denoiser(lambda z, t: conditional, SCHEDULE, kind)(z, t).x0)
    assert_close(ours.x0, theirs.x0)
    assert_close(ours.epsilon, theirs.epsilon)


def test_scale_one_is_no_guidance():
    _, z, _ = draw()
    conditional, unconditional = Denoised(z, z * 2), Denoised(z * 3, z * 4)
    assert guidance_weight(1.0) == 0.0
    assert guidance_weight(8.5) == 7.5
    assert torch.equal(guide(conditional, unconditional, 0.0).x0, conditional.x0)
    assert_close(guide(conditional, unconditional, -1.0).epsilon, unconditional.epsilon)


def test_rows_may_have_their_own_weight():
    _, z, _ = draw()
    conditional, unconditional = Denoised(z, z * 2), Denoised(z * 3, z * 4)
    weights = torch.linspace(-1, 3, len(z), dtype=z.dtype)
    together = guide(conditional, unconditional, weights.reshape(-1, 1, 1))
    for row, w in enumerate(weights.tolist()):
        assert_close(together.x0[row], guide(conditional, unconditional, w).x0[row])
