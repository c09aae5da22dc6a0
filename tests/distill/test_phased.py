"""Phased distillation: the parts of its loss against the formula, and against teachers known in closed form.

Errors are paired (same noise) and relative to the data's standard deviation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manylora.diffusion import Prediction, denoiser, last_latent, trailing_timesteps
from manylora.distill import Draw, PhasedConfig, PhasedObjective
from manylora.errors import ConfigError
from manylora.image.params import ImageParams
from manylora.image.sampler import sample, timesteps_of
from tests.distill import test_gaussian as gaussians
from tests.distill import test_mixtures as mixtures
from tests.distill.closed_forms import SCHEDULE, ExactTeacher, gaussian_flow, quantile_transport, rmse
from tests.distill.students import AffineStudent, GridStudent, distil_by_adam, distil_upwards, sampled
from tests.distill.test_objective import Bent, teacher


def objective(prediction: Prediction = Prediction.EPSILON, **settings: Any) -> PhasedObjective:
    config = PhasedConfig(**{"guidance_scale": 2.5, "loss": "l2", "phases": 5, **settings})
    return PhasedObjective(SCHEDULE, prediction, config)


def inputs(*index: int) -> tuple[Tensor, Tensor, Draw]:
    """A row at each of these solver steps, of five phases of ten."""
    rows = len(index)
    latents, condition = (torch.randn(rows, 2, dtype=torch.float64) for _ in range(2))
    drawn = Draw(torch.tensor(index), torch.randn_like(latents), torch.full((rows,), 1.5).double())
    return latents, condition, drawn


ANYWHERE = (0, 1, 7, 9, 10, 24, 29, 41, 49)
"""Steps at the start of a phase, a little above, in its middle and at its end."""


def written_out(
    student: Bent, latents: Tensor, condition: Tensor, draw: Draw, most_walked: int
) -> tuple[Tensor, Tensor]:
    """The student's jump and its target over the signal there, row by row, on the grid 0, 19, 39, .., 999."""
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for row, i in enumerate(draw.index.tolist()):
        w, c = draw.w[row], condition[row : row + 1]
        times = [max(20 * j - 1, 0) for j in range(i + 2)]
        bottom = times[i // 10 * 10]

        def ddim(z: Tensor, epsilon: Tensor, t: int, to: int) -> Tensor:
            a, b = SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[to]
            return b.sqrt() * (z - (1 - a).sqrt() * epsilon) / a.sqrt() + (1 - b).sqrt() * epsilon

        def jump(z: Tensor, t: int, c: Tensor = c, w: Tensor = w, bottom: int = bottom) -> Tensor:
            return ddim(z, student(z[None], torch.tensor([t]), c, w[None])[0], t, bottom)

        a = SCHEDULE.alpha_bar[times[i + 1]]
        z = a.sqrt() * latents[row] + (1 - a).sqrt() * draw.noise[row]
        signal = SCHEDULE.alpha_bar[bottom].sqrt()
        found.append(jump(z, times[i + 1]) / signal)
        for j in range(min(most_walked, i % 10 + 1)):
            t, to = times[i + 1 - j], times[i - j]
            epsilon_c, epsilon_u = teacher(z[None], torch.tensor([t]), c)
            z = ddim(z, (1 + w) * epsilon_c[0] - w * epsilon_u[0], t, to)
        wanted.append((z if to == bottom else jump(z, to)) / signal)
    return torch.stack(found), torch.stack(wanted)


@pytest.mark.parametrize("teacher_steps", [1, 2, 3, 10, None])
def test_the_loss_is_the_formula(teacher_steps):
    latents, condition, draw = inputs(*ANYWHERE)
    student = Bent()
    found, wanted = written_out(student, latents, condition, draw, teacher_steps or 10)
    ours = objective(teacher_steps=teacher_steps).loss(student, teacher, student, latents, condition, draw)
    assert ours.item() > 1e-4
    assert_close(ours, (found - wanted).square().mean())
    for row in range(len(latents)):  # alone, so that the rows' sum hides nothing
        one = slice(row, row + 1)
        alone = Draw(draw.index[one], draw.noise[one], draw.w[one])
        ours = objective(teacher_steps=teacher_steps).loss(
            student, teacher, student, latents[one], condition[one], alone
        )
        assert_close(ours, (found - wanted)[row].square().mean())


def test_the_target_has_no_gradient():
    latents, condition, draw = inputs(*ANYWHERE)
    student = Bent()
    found, wanted = written_out(student, latents, condition, draw, 1)
    stopped = torch.autograd.grad(
        (found - wanted.detach()).square().mean(), student.weight, retain_graph=True
    )[0]
    through = torch.autograd.grad((found - wanted).square().mean(), student.weight)[0]
    assert not torch.allclose(stopped, through, rtol=0.05)
    objective(teacher_steps=1).loss(student, teacher, student, latents, condition, draw).backward()
    assert student.weight.grad is not None
    assert_close(student.weight.grad, stopped)


def test_the_target_is_the_average_that_was_named_until_the_teacher_walks_all_of_the_phase():
    student, average = Bent(), Bent()
    average.weight.data += 0.5
    for teacher_steps, index, is_asked in ((1, (4, 24), True), (1, (0, 30), False), (None, (9, 49), False)):
        latents, condition, draw = inputs(*index)
        losses = [
            objective(teacher_steps=teacher_steps).loss(student, teacher, target, latents, condition, draw)
            for target in (average, student)
        ]
        assert torch.equal(*losses) is not is_asked


def test_the_teacher_is_asked_once_for_each_step_of_the_longest_walk():
    calls = []

    def counting(z: Tensor, t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        return teacher(z, t, condition)

    cases = ((1, ANYWHERE, 1), (3, (1, 20), 2), (3, (9, 0), 3), (None, (9, 49), 10))
    for teacher_steps, index, wanted in cases:
        latents, condition, draw = inputs(*index)
        calls.clear()
        objective(teacher_steps=teacher_steps).loss(Bent(), counting, Bent(), latents, condition, draw)
        assert calls == [False] * wanted


def test_a_jump_from_the_phases_start_goes_nowhere():
    """The boundary condition holds by itself, whatever the student says there."""
    z, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([199, 599, 0])
    assert (SCHEDULE.level(t, z).sigma > 0).all()
    nothing = torch.zeros(3, 2).double(), torch.zeros(3).double()
    assert_close(objective()._jump(Bent(), z, t, t, *nothing), z)
    elsewhere = torch.tensor([99, 499, 0])
    assert not torch.allclose(objective()._jump(Bent(), z, t, elsewhere, *nothing)[:2], z[:2])


@pytest.mark.parametrize(
    ("num_solver_steps", "phases"), [(50, 1), (50, 5), (16, 4), (48, 16), (52, 4), (7, 7)]
)
def test_phases_end_where_the_sampler_asks(num_solver_steps, phases):
    phased = objective(num_solver_steps=num_solver_steps, phases=phases)
    length = num_solver_steps // phases
    ends = phased.start_t[length - 1 :: length].tolist()
    assert ends[::-1] == trailing_timesteps(phases)
    assert phased.landing_t.tolist() == [0, *phased.start_t.tolist()[:-1]]
    assert phased.phase_start_t.tolist() == [t for t in [0, *ends[:-1]] for _ in range(length)]
    assert (phased.start_t > phased.landing_t).all()


def test_it_is_sampled_as_pictures_are_made_with_ddim():
    phased, student = objective(), Bent()
    z, w = torch.randn(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    condition = torch.zeros(3, 2, dtype=torch.float64)
    denoise = denoiser(lambda z, t: student(z, t, condition, w).detach(), SCHEDULE, phased.prediction)
    timesteps = timesteps_of(ImageParams(sampler="ddim", steps=5), SCHEDULE.num_timesteps)
    made = last_latent(sample("ddim", denoise, SCHEDULE, z, timesteps, torch.randn_like))
    found = phased.sample(denoise, z, 5, torch.randn_like)
    assert not torch.allclose(found, phased.sample(denoise, z, 4, torch.randn_like))
    assert torch.equal(found, made)


def test_draws_are_of_all_steps_or_of_the_ends_of_phases():
    latents = torch.zeros(2000, 2)
    walking = objective(teacher_steps=2).draw(latents, torch.Generator().manual_seed(3))
    assert sorted(set(walking.index.tolist())) == list(range(50))
    whole = objective().draw(latents, torch.Generator().manual_seed(3)).index
    assert sorted(set(whole.tolist())) == [9, 19, 29, 39, 49]
    again, other = (
        objective(teacher_steps=2).draw(latents, torch.Generator().manual_seed(seed)) for seed in (3, 4)
    )
    assert torch.equal(again.index, walking.index)
    assert not torch.equal(again.noise, other.noise)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"phases": 0}, "phases"),
        ({"phases": 4}, "near are 48 and 52"),
        ({"teacher_steps": 0}, r"teacher_steps must lie in \[1, 10\]"),
        ({"teacher_steps": 11}, "teacher_steps"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        objective(**settings)


@pytest.mark.parametrize(("phases", "teacher_steps"), [(5, 1), (5, None), (2, 5), (1, 1)])
def test_a_gaussian_is_walked_in_as_many_steps_as_phases(phases, teacher_steps):
    """Guided: from the same noise the student ends where the teacher's fifty steps do, and near the exact flow."""
    phased = objective(
        Prediction.V,
        guidance_scale=gaussians.GUIDANCE_SCALE,
        phases=phases,
        teacher_steps=teacher_steps,
    )
    student, z = AffineStudent(2), gaussians.noise()
    wanted = gaussians.TEACHER.flow(z, gaussians.GUIDANCE_SCALE)
    w = gaussians.GUIDANCE_SCALE - 1
    assert rmse(sampled(phased, student, z, phases, w), wanted) / gaussians.STD > 0.3
    coarse = gaussians.TEACHER.flow(z, gaussians.GUIDANCE_SCALE, num_steps=phases)
    assert rmse(coarse, wanted) / gaussians.STD > 0.05, (
        "as many steps of the teacher itself do not get there"
    )
    # The walk of a whole phase is ten times the work of one step, and its target does not move.
    num_steps = 3000 if teacher_steps == 1 else 600
    distil_by_adam(phased, student, gaussians.TEACHER, num_steps=num_steps)
    found = sampled(phased, student, z, phases, w)
    assert rmse(found, wanted) / gaussians.STD < 0.02
    assert rmse(found, gaussian_flow(gaussians.EXACT, z, 999, 0)) / gaussians.STD < 0.06


@pytest.mark.parametrize(("phases", "teacher_steps"), [(5, 1), (2, None)])
def test_a_line_is_walked_by_quantiles(phases, teacher_steps):
    data = mixtures.LINE
    exact = ExactTeacher(data, data, GridStudent.prediction)
    phased = objective(
        GridStudent.prediction, guidance_scale=1.0, phases=phases, teacher_steps=teacher_steps
    )
    student, z = GridStudent(data, 1601, 5.0), mixtures.noise(4000, 1)
    wanted, keep = exact.flow(z, 1.0), mixtures.away_from_the_tear(exact, 1.0, z)
    before = sampled(phased, student, z, phases)
    assert rmse(before[keep], wanted[keep]) / data.std() > 0.08
    distil_upwards(phased, student, exact)
    found = sampled(phased, student, z, phases)
    assert rmse(found[keep], wanted[keep]) / data.std() < 0.03
    assert rmse(found[keep], quantile_transport(data, z, 999, 0)[keep]) / data.std() < 0.04


@pytest.mark.parametrize("name", mixtures.CASES)
def test_the_plane_is_walked_in_five_steps(name):
    conditional, guidance_scale = mixtures.CASES[name]
    exact = ExactTeacher(conditional, mixtures.PLANE, GridStudent.prediction)
    phased = objective(GridStudent.prediction, guidance_scale=guidance_scale, teacher_steps=1)
    student, z = GridStudent(conditional, 201, 3.5), mixtures.noise(2000, 2)
    wanted = exact.flow(z, guidance_scale)
    keep = mixtures.away_from_the_tear(exact, guidance_scale, z)
    before = sampled(phased, student, z, 5)
    assert rmse(before[keep], wanted[keep]) / conditional.std() > 0.08
    distil_upwards(phased, student, exact)
    assert rmse(sampled(phased, student, z, 5)[keep], wanted[keep]) / conditional.std() < 0.03


def test_each_phase_alone_is_the_teachers_steps_through_it():
    """Not only the whole way: from the exact place at a phase's end one jump goes where ten solver steps go."""
    phased = objective(Prediction.V, guidance_scale=gaussians.GUIDANCE_SCALE, teacher_steps=1)
    student = AffineStudent(2)
    distil_by_adam(phased, student, gaussians.TEACHER, num_steps=3000)
    w = torch.full((4000,), gaussians.GUIDANCE_SCALE - 1).double()
    for index in (9, 19, 29, 39, 49):
        z = gaussian_flow(gaussians.EXACT, gaussians.noise(), 999, int(phased.start_t[index]))
        rows = torch.full((len(z),), index)
        t, end_t = phased.start_t[rows], phased.phase_start_t[rows]
        found = phased._jump(student, z, t, end_t, None, w).detach()
        walking = objective(Prediction.V, guidance_scale=gaussians.GUIDANCE_SCALE)
        wanted, stopped = walking._walk(gaussians.TEACHER, z, rows, None, w)
        assert torch.equal(stopped, end_t)
        assert rmse(wanted, z) / gaussians.STD > 0.1, "the phase leads somewhere"
        assert rmse(found, wanted) / gaussians.STD < 0.01
