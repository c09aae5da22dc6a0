"""The train step's parts, each against the formula written out, and what may learn from it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from manylora.diffusion import Prediction
from manylora.distill import ConsistencyObjective, Draw, EmaWeights, ObjectiveConfig
from manylora.errors import ConfigError
from tests.distill.closed_forms import SCHEDULE


class Bent(nn.Module):
    """Some student: bent in z, different at each t, with a weight to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.8, -0.3], dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, condition: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(self.weight * z + condition + t[:, None] / 1000 + 0.1 * w[:, None])


def teacher(z: Tensor, t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sin(z + condition + t[:, None] / 500), torch.cos(z)


def inputs(rows: int = 6) -> tuple[Tensor, Tensor, Draw]:
    latents, condition = (torch.randn(rows, 2, dtype=torch.float64) for _ in range(2))
    index = torch.tensor([0, 1, 2, 24, 48, 49])
    return latents, condition, Draw(index, torch.randn_like(latents), torch.full((rows,), 1.5).double())


def objective(**settings: Any) -> ConsistencyObjective:
    return ConsistencyObjective(
        SCHEDULE, Prediction.EPSILON, ObjectiveConfig(**{"guidance_scale": 2.5, **settings})
    )


def written_out(student: Bent, latents: Tensor, condition: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """f(student) at the start and at the landing, from the formulas of the paper, row by row."""
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for row, i in enumerate(draw.index.tolist()):
        start, landing = 20 * i + 19, (20 * i - 1 if i else 0)
        a, b = SCHEDULE.alpha_bar[start], SCHEDULE.alpha_bar[landing]
        w, c = draw.w[row], condition[row : row + 1]
        z = a.sqrt() * latents[row] + (1 - a).sqrt() * draw.noise[row]
        epsilon_c, epsilon_u = teacher(z[None], torch.tensor([start]), c)
        epsilon = (1 + w) * epsilon_c[0] - w * epsilon_u[0]
        z_landing = b.sqrt() * (z - (1 - a).sqrt() * epsilon) / a.sqrt() + (1 - b).sqrt() * epsilon
        for end, latent, t, alpha_bar in ((found, z, start, a), (wanted, z_landing, landing, b)):
            output = student(latent[None], torch.tensor([t]), c, w[None])[0]
            x0 = (latent - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
            s = 10.0 * t
            end.append(0.25 / (s**2 + 0.25) * latent + s / (s**2 + 0.25) ** 0.5 * x0)
    return torch.stack(found), torch.stack(wanted)


@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_the_loss_is_the_formula(loss):
    latents, condition, draw = inputs()
    student = Bent()
    found, wanted = written_out(student, latents, condition, draw)
    difference = found - wanted
    expected = difference**2 if loss == "l2" else (difference**2 + 1e-6).sqrt() - 1e-3
    ours = objective(loss=loss).loss(student, teacher, student, latents, condition, draw)
    assert ours.item() > 1e-3
    assert_close(ours, expected.mean())


@pytest.mark.parametrize("row", range(6))
def test_each_solver_step_is_the_formula(row):
    """One row alone, so that the rows' sum hides nothing: the first step lands on alpha_bar[0], not on 1."""
    latents, condition, draw = inputs()
    one = slice(row, row + 1)
    latents, condition = latents[one], condition[one]
    draw = Draw(draw.index[one], draw.noise[one], draw.w[one])
    student = Bent()
    found, wanted = written_out(student, latents, condition, draw)
    ours = objective(loss="l2").loss(student, teacher, student, latents, condition, draw)
    assert_close(ours, (found - wanted).square().mean())


def test_the_target_has_no_gradient():
    latents, condition, draw = inputs()
    student = Bent()
    found, wanted = written_out(student, latents, condition, draw)
    stopped = torch.autograd.grad(
        (found - wanted.detach()).square().mean(), student.weight, retain_graph=True
    )[0]
    through = torch.autograd.grad((found - wanted).square().mean(), student.weight)[0]
    assert not torch.allclose(stopped, through, rtol=0.05)
    objective(loss="l2").loss(student, teacher, student, latents, condition, draw).backward()
    assert student.weight.grad is not None
    assert_close(student.weight.grad, stopped)


def test_the_target_is_the_student_that_was_named():
    latents, condition, draw = inputs()
    student, average = Bent(), Bent()
    average.weight.data += 0.5
    with_average = objective(loss="l2").loss(student, teacher, average, latents, condition, draw)
    alone = objective(loss="l2").loss(student, teacher, student, latents, condition, draw)
    assert not torch.allclose(with_average, alone)
    found, _ = written_out(student, latents, condition, draw)
    _, wanted = written_out(average, latents, condition, draw)
    assert_close(with_average, (found - wanted).square().mean())
    with_average.backward()
    assert average.weight.grad is None


def test_the_teacher_is_asked_once_a_step():
    calls = []

    def counting(z: Tensor, t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        return teacher(z, t, condition)

    latents, condition, draw = inputs()
    objective().loss(Bent(), counting, Bent(), latents, condition, draw)
    assert calls == [False]


def test_w_is_the_guidance_scale_less_one():
    draw = objective(guidance_scale=8.5).draw(torch.zeros(7, 2))
    assert torch.equal(draw.w, torch.full((7,), 7.5))


def test_draws_cover_their_ranges_and_repeat_by_seed():
    latents = torch.zeros(5000, 2)
    chance = objective(guidance_scale=3.0, max_guidance_scale=9.0)
    draw = chance.draw(latents, torch.Generator().manual_seed(3))
    assert sorted(set(draw.index.tolist())) == list(range(50))
    assert 2.0 <= draw.w.min() < 2.05
    assert 7.95 < draw.w.max() <= 8.0
    assert draw.w.mean().item() == pytest.approx(5.0, abs=0.1)
    again = chance.draw(latents, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in ((draw.index, again.index), (draw.noise, again.noise)))
    other = chance.draw(latents, torch.Generator().manual_seed(4))
    assert not torch.equal(draw.noise, other.noise)


def test_half_precision_latents_are_widened():
    latents = torch.randn(6, 2).half()
    draw = objective().draw(latents)
    assert draw.noise.dtype == torch.float32

    def student(z: Tensor, t: Tensor, condition: None, w: Tensor) -> Tensor:
        assert z.dtype == torch.float32
        return z.half()

    def half_teacher(z: Tensor, t: Tensor, condition: None) -> tuple[Tensor, Tensor]:
        return z.half(), z.half()

    assert objective().loss(student, half_teacher, student, latents, None, draw).dtype == torch.float32


def test_fewer_solver_steps_make_longer_ones():
    few = objective(num_solver_steps=10)
    assert few.start_t.tolist() == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    assert few.landing_t.tolist() == [0, *few.start_t.tolist()[:-1]]
    latents, condition, draw = inputs()
    draw = replace(draw, index=draw.index % 10)
    student = Bent()
    long, short = (o.loss(student, teacher, student, latents, condition, draw) for o in (few, objective()))
    assert not torch.allclose(long, short)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": 3.0, "max_guidance_scale": 3.0}, "max_guidance_scale"),
        ({"loss": "l1"}, "loss"),
        ({"huber_c": 0.0}, "huber_c"),
        ({"num_solver_steps": 0}, "num_solver_steps"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        objective(**settings)


def test_the_average_follows_and_changes_places():
    student = Bent()
    ema = EmaWeights(dict(student.named_parameters()), 0.9)
    before = student.weight.detach().clone()
    student.weight.data += 1.0
    ema.update()
    ema.update()
    assert_close(ema.average["weight"], before + (1 - 0.9**2))
    with ema.in_use():
        assert_close(student.weight.data, before + (1 - 0.9**2))
    assert_close(student.weight.data, before + 1.0)
    with pytest.raises(ConfigError, match="decay"):
        EmaWeights({}, 1.0)
