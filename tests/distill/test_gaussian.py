"""Distillation of Gaussian data, where everything is known: the flow, the guided flow, and what a wrong w would learn.

Errors are paired (same noise) and relative to the data's standard deviation.
"""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manylora.diffusion import Denoised, Denoiser, Prediction, last_latent, lcm_sample, lcm_timesteps
from manylora.distill import ConsistencyObjective, ObjectiveConfig
from tests.distill.closed_forms import SCHEDULE, ExactTeacher, gaussian, gaussian_flow, rmse, shifted
from tests.distill.students import AffineStudent, distil_by_adam, one_step

COVARIANCE = [[0.5, 0.3], [0.3, 0.8]]
CONDITIONAL = gaussian([0.5, -1.0], COVARIANCE)
UNCONDITIONAL = gaussian([-0.2, -0.5], COVARIANCE)
TEACHER = ExactTeacher(CONDITIONAL, UNCONDITIONAL, Prediction.V)
STD = CONDITIONAL.std()
GUIDANCE_SCALE = 3.0  # w = 2
EXACT = shifted(CONDITIONAL, UNCONDITIONAL, GUIDANCE_SCALE - 1.0)
"""The data whose unguided flow is the guided flow of the teacher."""

SOLVER_ERROR_IN_COVARIANCE = 0.065
"""Fifty steps of DDIM are 3.2 % short of the data's spread, so twice that of a variance of up to 0.8; some room."""


def objective(**settings: float) -> ConsistencyObjective:
    config = ObjectiveConfig(loss="l2", **{"guidance_scale": GUIDANCE_SCALE, **settings})  # type: ignore[arg-type]
    return ConsistencyObjective(SCHEDULE, Prediction.V, config)


def noise(rows: int = 4000) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture(scope="module")
def student() -> AffineStudent:
    student = AffineStudent(2)
    distil_by_adam(objective(), student, TEACHER, num_steps=3000)
    return student


def test_the_teacher_goes_the_closed_way_as_its_steps_grow():
    """The solver's own error, known apart from the student's; it halves when the steps double (DDIM is first order).

    A sign, or w for w + 1, or a wrong last alpha_bar would leave an error that does not.
    """
    z, exact = noise(), gaussian_flow(EXACT, noise(), 999, 0)
    errors = [rmse(TEACHER.flow(z, GUIDANCE_SCALE, num_steps), exact) / STD for num_steps in (50, 100, 200)]
    assert rmse(gaussian_flow(CONDITIONAL, z, 999, 0), exact) / STD > 0.5
    assert 0.02 < errors[0] < 0.05
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2.0, 2.0], rel=0.1)


def test_one_step_of_the_student_is_fifty_of_the_teacher(student):
    z = noise()
    teacher = TEACHER.flow(z, GUIDANCE_SCALE)
    assert rmse(one_step(AffineStudent(2), Prediction.V, z), teacher) / STD > 0.5
    assert rmse(one_step(student, Prediction.V, z), teacher) / STD < 0.01


@pytest.mark.parametrize("from_step", [10, 25, 40, 49])
def test_so_it_is_from_every_point_of_the_way(student, from_step):
    t = 999 - 20 * from_step
    level = SCHEDULE.level(torch.tensor([t]), noise())
    z = level.signal * CONDITIONAL.sample(4000, torch.Generator().manual_seed(6)) + level.sigma * noise()
    teacher = TEACHER.flow(z, GUIDANCE_SCALE, from_step=from_step)
    assert rmse(one_step(student, Prediction.V, z, t), teacher) / STD < 0.01


def test_the_student_is_the_closed_form_but_for_the_solver(student):
    """Mean and covariance of what one step draws are those of the guided Gaussian: the sign of w, and w = scale - 1."""
    drawn = one_step(student, Prediction.V, noise(100_000))
    exact = gaussian_flow(EXACT, noise(100_000), 999, 0)
    assert rmse(drawn, exact) / STD < 0.05
    for wrong_w in (-2.0, 0.0, 1.0, 3.0):
        other = gaussian_flow(shifted(CONDITIONAL, UNCONDITIONAL, wrong_w), noise(100_000), 999, 0)
        assert rmse(drawn, other) / STD > 0.4
    teacher = TEACHER.flow(noise(100_000), GUIDANCE_SCALE)
    assert_close(drawn.T.cov(), teacher.T.cov(), atol=0.015, rtol=0.0)
    assert_close(drawn.T.cov(), exact.T.cov(), atol=SOLVER_ERROR_IN_COVARIANCE, rtol=0.0)


def test_the_average_as_target_has_the_same_fixed_point():
    student, z = AffineStudent(2), noise()
    distil_by_adam(objective(), student, TEACHER, num_steps=3000, ema_decay=0.8)
    assert rmse(one_step(student, Prediction.V, z), TEACHER.flow(z, GUIDANCE_SCALE)) / STD < 0.01


@pytest.mark.parametrize("prediction", [Prediction.X0])
def test_other_predictions_have_the_same_fixed_point(prediction):
    teacher = ExactTeacher(CONDITIONAL, UNCONDITIONAL, prediction)
    student, z = AffineStudent(2), noise()
    config = ObjectiveConfig(loss="l2", guidance_scale=GUIDANCE_SCALE)
    distil_by_adam(ConsistencyObjective(SCHEDULE, prediction, config), student, teacher, num_steps=3000)
    assert rmse(one_step(student, prediction, z), TEACHER.flow(z, GUIDANCE_SCALE)) / STD < 0.01


RANGE = {"guidance_scale": 2.0, "max_guidance_scale": 6.0}  # w from 1 to 5


def test_random_unseen_w_learns_the_average():
    """What public scripts for LoRAs do: the student is as good as the mean w makes it, and wrong for every other."""
    student, z = AffineStudent(2), noise()
    distil_by_adam(objective(**RANGE), student, TEACHER, num_steps=4000, rows=1024)
    errors = {
        w: rmse(one_step(student, Prediction.V, z, w=w), TEACHER.flow(z, w + 1)) / STD
        for w in (1.0, 3.0, 5.0)
    }
    assert errors[3.0] < 0.05
    assert min(errors[1.0], errors[5.0]) > 0.5


def test_a_student_that_sees_w_learns_each():
    student, z = AffineStudent(2, mean_w=3.0), noise()
    distil_by_adam(objective(**RANGE), student, TEACHER, num_steps=4000, rows=1024)
    for w in (1.0, 3.0, 5.0):
        assert rmse(one_step(student, Prediction.V, z, w=w), TEACHER.flow(z, w + 1)) / STD < 0.01


@pytest.mark.parametrize("num_steps", [2, 4, 8])
def test_multistep_sampling_leaves_the_marginal_right(num_steps):
    """With the exact end of the way, each jump draws from the data, and noising it gives the marginal of the next t."""
    rows, generator = 200_000, torch.Generator().manual_seed(7)

    def exact_end(z: Tensor, t: Tensor) -> Denoised:
        return Denoised(gaussian_flow(CONDITIONAL, z, int(t[0]), None), z)

    def one_look(z: Tensor, t: Tensor) -> Denoised:
        return CONDITIONAL.denoised(z, t)

    def drawn(denoise: Denoiser) -> Tensor:
        level = SCHEDULE.level(torch.tensor([999]), torch.zeros(1, 2, dtype=torch.float64))
        start = level.signal * CONDITIONAL.sample(rows, generator) + level.sigma * normal(
            torch.empty(rows, 2)
        )
        steps = lcm_sample(denoise, SCHEDULE, start, lcm_timesteps(num_steps), normal)
        return last_latent(steps)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    found = drawn(exact_end)
    # Five standard errors of a mean and of a covariance of this many rows.
    assert_close(found.mean(0), CONDITIONAL.means[0], atol=5 * (0.8 / rows) ** 0.5, rtol=0.0)
    assert_close(found.T.cov(), CONDITIONAL.covariance, atol=5 * 0.8 * (2 / rows) ** 0.5, rtol=0.0)
    # The base without distillation, in the same sampler, loses spread: what is tested is not a matter of course.
    assert (drawn(one_look).T.cov() - CONDITIONAL.covariance).abs().max() > 0.1


def test_multistep_sampling_of_the_student_is_that_of_the_teachers_fifty_steps():
    """In the same sampler with the same noise, what the student jumps to is what the teacher would walk to."""
    student = AffineStudent(2)
    distil_by_adam(objective(guidance_scale=1.0), student, TEACHER, num_steps=3000)

    def jump(z: Tensor, t: Tensor) -> Denoised:
        return Denoised(one_step(student, Prediction.V, z, int(t[0])), z)

    def walk(z: Tensor, t: Tensor) -> Denoised:
        return Denoised(TEACHER.flow(z, 1.0, from_step=(999 - int(t[0])) // 20), z)

    def drawn(denoise: Denoiser, num_steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(8)

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64)

        return last_latent(lcm_sample(denoise, SCHEDULE, noise(), lcm_timesteps(num_steps), normal))

    for num_steps in (1, 2, 4, 8):
        assert rmse(drawn(jump, num_steps), drawn(CONDITIONAL.denoised, num_steps)) / STD > 0.1
        assert rmse(drawn(jump, num_steps), drawn(walk, num_steps)) / STD < 0.02
