"""Students that can hold the answer exactly, or nearly, and a run of the train step over them."""

# Shapes: B rows, D dimensions (1 or 2), S solver steps, K knots a dimension.

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from manylora.diffusion import Denoised, Denoiser, Prediction, consistency, denoised_from
from manylora.distill import EmaWeights, Objective, PhasedObjective
from tests.distill.closed_forms import SCHEDULE, ExactTeacher, Mixture

NUM_SOLVER_STEPS = 50


def solver_index(t: Tensor) -> Tensor:
    """The solver step that starts at t. At 0, where the consistency function asks for nothing, the first."""
    return ((t + 1) // 20 - 1).clamp(min=0)


class AffineStudent(nn.Module):
    """One affine map of z for each solver step, and if asked one of w: holds the flow of Gaussians exactly."""

    def __init__(self, num_dims: int, mean_w: float | None = None) -> None:
        super().__init__()
        self.mean_w = (
            mean_w or 0.0
        )  # w enters less its mean, or slope and offset would learn against each other
        self.matrix = nn.Parameter(torch.zeros(NUM_SOLVER_STEPS, num_dims, num_dims, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(NUM_SOLVER_STEPS, num_dims, dtype=torch.float64))
        self.by_w = nn.Parameter(
            torch.zeros(NUM_SOLVER_STEPS, num_dims, dtype=torch.float64), requires_grad=mean_w is not None
        )

    def forward(self, z: Tensor, t: Tensor, condition: None, w: Tensor) -> Tensor:
        index = solver_index(t)
        affine = (self.matrix[index] @ z[..., None])[..., 0] + self.offset[index]
        return affine + (w - self.mean_w)[:, None] * self.by_w[index]


class GridStudent(nn.Module):
    """For each solver step a table over a grid of z, read by linear interpolation; starts as the unguided teacher."""

    prediction = Prediction.X0

    def __init__(self, data: Mixture, num_knots: int, reach: float) -> None:
        super().__init__()
        self.num_knots, self.reach = num_knots, reach
        num_dims = data.means.shape[1]
        axis = torch.linspace(-reach, reach, num_knots, dtype=torch.float64)
        self.knots = torch.cartesian_prod(*[axis] * num_dims).reshape(-1, num_dims)  # [K^D, D]
        teacher = ExactTeacher(data, data, self.prediction)
        self.tables = nn.ParameterList(
            nn.Parameter(teacher(self.knots, torch.full((len(self.knots),), 20 * i + 19))[0])
            for i in range(NUM_SOLVER_STEPS)
        )

    def forward(self, z: Tensor, t: Tensor, condition: None, w: Tensor) -> Tensor:
        (index,) = solver_index(t).unique().tolist()  # a batch of these tests stays at one solver step
        place = (z.clamp(-self.reach, self.reach) + self.reach) * (self.num_knots - 1) / (2 * self.reach)
        low = place.floor().clamp(max=self.num_knots - 2)
        share, low = place - low, low.long()
        value = torch.zeros_like(z)
        for corner in range(2 ** z.shape[1]):
            upper = torch.tensor([corner >> d & 1 for d in range(z.shape[1])])
            knot = torch.zeros(len(z), dtype=torch.int64)
            for d in range(z.shape[1]):
                knot = knot * self.num_knots + low[:, d] + upper[d]
            weight = torch.where(upper.bool(), share, 1 - share).prod(1, keepdim=True)
            value = value + weight * self.tables[index][knot]
        return value


def one_step(student: nn.Module, prediction: Prediction, z: Tensor, t: int = 999, w: float = 0.0) -> Tensor:
    """The student's whole sampling in one step: its consistency function at t."""
    rows = torch.full((len(z),), t)
    with torch.no_grad():
        output = student(z, rows, None, torch.full((len(z),), w, dtype=z.dtype))
        return consistency(z, denoised_from(output, z, SCHEDULE.level(rows, z), prediction).x0, rows)


def sampled(
    objective: Objective, student: nn.Module, z: Tensor, num_steps: int, w: float = 0.0
) -> Tensor:  # [B, D]
    """Where the objective's own sampler takes noise z [B, D]; one that draws noise is refused."""

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        output = student(z, t, None, torch.full((len(z),), w, dtype=z.dtype))
        return denoised_from(output, z, SCHEDULE.level(t, z), objective.prediction)

    def no_noise(z: Tensor) -> Tensor:
        raise AssertionError("a deterministic sampler asks for no noise")

    asked: Denoiser = denoise
    with torch.no_grad():
        return objective.sample(asked, z, num_steps, no_noise)


def sensitivity(objective: Objective, index: int) -> float:
    """How much what the loss compares moves with the student's x0: for a consistency function c_out, which is 1."""
    if not isinstance(objective, PhasedObjective):
        return 1.0
    one = torch.zeros(1, 1, dtype=torch.float64)
    level, to = (
        SCHEDULE.level(grid[index : index + 1], one)
        for grid in (objective.start_t, objective.phase_start_t)
    )
    return float(1.0 - to.sigma * level.signal / (level.sigma * to.signal))


def distil_by_adam(
    objective: Objective,
    student: nn.Module,
    teacher: ExactTeacher,
    *,
    num_steps: int,
    rows: int = 512,
    learning_rate: float = 0.05,
    ema_decay: float | None = None,
) -> list[float]:
    """Distil as the trainer does: random solver steps, Adam, a falling learning rate. Returns the losses."""
    generator = torch.Generator().manual_seed(1)
    learning = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.Adam(learning.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    ema = None if ema_decay is None else EmaWeights(learning, ema_decay)

    def average_of_student(z: Tensor, t: Tensor, condition: None, w: Tensor) -> Tensor:
        assert ema is not None
        with ema.in_use():
            output: Tensor = student(z, t, condition, w)
        return output

    losses = []
    for _ in range(num_steps):
        latents = teacher.conditional.sample(rows, generator)
        loss = objective.loss(
            student,
            teacher,
            student if ema is None else average_of_student,
            latents,
            None,
            objective.draw(latents, generator),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if ema is not None:
            ema.update()
        losses.append(loss.item())
    return losses


def distil_upwards(objective: Objective, student: GridStudent, teacher: ExactTeacher) -> None:
    """Distil one solver step after the other, from the data upwards, each until it has converged.

    Each step only asks the one below it, so this is the fixed point that random steps would reach, reached sooner.
    The noise is chosen so that the noisy latents are the knots: then every knot is learnt, also those that the data
    seldom visit but a guided trajectory crosses.
    """
    generator = torch.Generator().manual_seed(1)
    latents = teacher.conditional.sample(len(student.knots), generator)
    for index in range(NUM_SOLVER_STEPS):
        # The l2 loss is a mean of squares of what is linear in the outputs (x0), one by one, so with this rate one step
        # of gradient descent goes all the way; the second shows that nothing is left.
        rate = latents.numel() / 2 / sensitivity(objective, index) ** 2
        optimizer = torch.optim.SGD(student.parameters(), lr=rate)
        draw = objective.draw(latents, generator)
        draw = replace(draw, index=torch.full_like(draw.index, index))
        level = SCHEDULE.level(objective.start_t[draw.index], latents)
        draw = replace(draw, noise=(student.knots - level.signal * latents) / level.sigma)
        for _ in range(2):
            loss = objective.loss(student, teacher, student, latents, None, draw)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 1e-8, (index, loss.item())
