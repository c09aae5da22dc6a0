"""The oracle table: students distilled by manylora.distill's own train step on data whose flow is known.

Paired (same noise) root mean square errors, relative to the data's standard deviation. Beside each stands what the
undistilled student has, so that a bound is not met as a matter of course.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from manylora.diffusion import Prediction, lcm_timesteps, trailing_timesteps
from manylora.distill import ConsistencyObjective, ObjectiveConfig
from points import Line
from tested import tested
from tests.distill import test_gaussian, test_mixtures
from tests.distill.closed_forms import SCHEDULE, ExactTeacher, gaussian_flow, quantile_transport, rmse
from tests.distill.students import AffineStudent, GridStudent, distil_by_adam, one_step

GAUSSIAN_BOUND = 0.01
MIXTURE_BOUND = 0.03

GROUPS = {
    "the same, and what else holds of them, as tests": [
        "tests/distill/test_gaussian.py",
        "tests/distill/test_mixtures.py",
        "tests/distill/test_objective.py",
    ],
    "schedule, predictions, solvers, samplers equal diffusers'": ["tests/diffusion"],
}


def lines() -> Iterator[Line]:
    torch.set_num_threads(1)  # tensors of a few numbers only wait for a second thread
    yield _gaussian()
    yield from _w_average()
    yield _line()
    for name in test_mixtures.CASES:
        yield _plane(name)
    yield _timesteps()
    yield from tested(GROUPS)


def _gaussian() -> Line:
    """A guided Gaussian: one step against 50 guided DDIM steps, and against the closed form of the guided flow."""
    of = test_gaussian
    student, z = AffineStudent(2), of.noise()
    wanted = of.TEACHER.flow(z, of.GUIDANCE_SCALE)
    before = rmse(one_step(student, Prediction.V, z), wanted) / of.STD
    distil_by_adam(of.objective(), student, of.TEACHER, num_steps=3000)
    found = one_step(student, Prediction.V, z)
    error = rmse(found, wanted) / of.STD
    exact = rmse(found, gaussian_flow(of.EXACT, z, 999, 0)) / of.STD
    return Line(
        "Gaussian, guided: one step against the teacher's 50",
        f"{error:.2%} (undistilled {before:.0%}; to the exact flow {exact:.1%})",
        f"<= {GAUSSIAN_BOUND:.0%}",
        error <= GAUSSIAN_BOUND < before,
    )


def _w_average() -> Iterator[Line]:
    """w drawn from 1 to 5 and unseen is learnt as its mean; a student that sees w learns each."""
    of = test_gaussian
    for name, student, seen in (
        ("unseen", AffineStudent(2), False),
        ("conditioned on", AffineStudent(2, mean_w=3.0), True),
    ):
        distil_by_adam(of.objective(**of.RANGE), student, of.TEACHER, num_steps=4000, rows=1024)
        errors = [
            rmse(one_step(student, Prediction.V, of.noise(), w=w), of.TEACHER.flow(of.noise(), w + 1))
            / of.STD
            for w in (1.0, 3.0, 5.0)
        ]
        ok = max(errors) <= GAUSSIAN_BOUND if seen else errors[1] < 0.05 and min(errors[::2]) > 0.5
        yield Line(
            f"random w, {name}: error at w = 1, 3, 5",
            ", ".join(f"{error:.1%}" for error in errors),
            f"<= {GAUSSIAN_BOUND:.0%} each" if seen else "< 5% in the middle alone: the average is learnt",
            ok,
        )


def _line() -> Line:
    of = test_mixtures
    student = of.distilled(ExactTeacher(of.LINE, of.LINE, GridStudent.prediction), 1.0, 1601, 5.0)
    teacher, z = ExactTeacher(of.LINE, of.LINE), of.noise(4000, 1)
    keep = of.away_from_the_tear(teacher, 1.0, z)
    found, undistilled = one_step(student, student.prediction, z), GridStudent(of.LINE, 1601, 5.0)
    before = one_step(undistilled, undistilled.prediction, z)
    by_quantiles = rmse(found[keep], quantile_transport(of.LINE, z, 999, 0)[keep]) / of.LINE.std()
    return _mixture_line(
        "mixture on a line",
        found,
        before,
        teacher.flow(z, 1.0),
        keep,
        of.LINE.std(),
        f"; to the quantiles {by_quantiles:.1%}",
    )


def _plane(name: str) -> Line:
    of = test_mixtures
    conditional, guidance_scale = of.CASES[name]
    teacher = ExactTeacher(conditional, of.PLANE, GridStudent.prediction)
    student, undistilled = (
        of.distilled(teacher, guidance_scale, 201, 3.5),
        GridStudent(conditional, 201, 3.5),
    )
    z = of.noise(2000, 2)
    return _mixture_line(
        f"mixture in the plane, {name}",
        one_step(student, student.prediction, z),
        one_step(undistilled, undistilled.prediction, z),
        teacher.flow(z, guidance_scale),
        of.away_from_the_tear(teacher, guidance_scale, z),
        conditional.std(),
    )


def _mixture_line(
    name: str, found: Tensor, before: Tensor, wanted: Tensor, keep: Tensor, std: float, more: str = ""
) -> Line:
    error, undistilled = (rmse(x[keep], wanted[keep]) / std for x in (found, before))
    return Line(
        f"{name}: one step against the teacher's 50",
        f"{error:.2%} of 98% of the mass (undistilled {undistilled:.0%}{more})",
        f"<= {MIXTURE_BOUND:.0%}",
        error <= MIXTURE_BOUND < undistilled,
    )


def _timesteps() -> Line:
    """LCM's timesteps against diffusers' own scheduler; the objective starts from the 50 of DDIM `trailing`."""
    from diffusers import LCMScheduler

    theirs = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    equal = 0
    for num_steps in range(1, 9):
        theirs.set_timesteps(num_steps, original_inference_steps=50)
        equal += list(lcm_timesteps(num_steps)) == theirs.timesteps.tolist()
    starts = ConsistencyObjective(SCHEDULE, Prediction.V, ObjectiveConfig()).start_t.tolist()
    same_grid = sorted(starts) == sorted(trailing_timesteps(50))
    return Line(
        "timesteps of 1 to 8 LCM steps equal diffusers'",
        f"{equal} of 8; grid of 50 starts {'equal' if same_grid else 'DIFFERENT'}",
        "8 of 8, equal",
        equal == 8 and same_grid,
    )
