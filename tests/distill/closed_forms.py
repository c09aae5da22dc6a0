"""Data whose diffusion is known in closed form: the networks that a perfect teacher would be, and their exact flows."""

# Shapes: B rows, D dimensions (1 or 2), M components.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.diffusion import (
    Denoised,
    NoiseSchedule,
    Prediction,
    ddim_step,
    guided_denoiser,
    last_latent,
    output_from,
    solve,
    trailing_timesteps,
)

SCHEDULE = NoiseSchedule.scaled_linear()


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussians with one covariance: the diffused score is a softmax over components."""

    means: Tensor  # [M, D]
    weights: Tensor  # [M]
    covariance: Tensor  # [D, D]

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        factor: Tensor = torch.linalg.cholesky(self.covariance)
        return self.means[which] + noise @ factor.T

    def std(self) -> float:
        """Root mean square over dimensions of the data's standard deviation."""
        mean = self.weights @ self.means
        spread = self.weights @ (self.means - mean) ** 2 + self.covariance.diagonal()
        return float(spread.mean().sqrt())

    def denoised(self, z: Tensor, t: Tensor) -> Denoised:
        """The exact expectation of x0 and epsilon given z [B, D] at t [B]: epsilon = -sigma * grad log p_t(z)."""
        level = SCHEDULE.level(t, z)
        # In the covariance's own axes the diffused covariance is diagonal at every t.
        variances, axes = torch.linalg.eigh(self.covariance)  # [D], [D, D]
        away = (z @ axes)[:, None] - level.signal[..., None] * (self.means @ axes)  # [B, M, D]
        solved = away / (level.signal**2 * variances + level.sigma**2)[:, None]  # [B, M, D]
        share = (self.weights.log() - 0.5 * (away * solved).sum(-1)).softmax(-1)  # [B, M]
        epsilon = level.sigma * ((share[..., None] * solved).sum(1) @ axes.mT)
        return Denoised((z - level.sigma * epsilon) / level.signal, epsilon)


def gaussian(mean: list[float], covariance: list[list[float]]) -> Mixture:
    return Mixture(
        torch.tensor([mean], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        torch.tensor(covariance, dtype=torch.float64),
    )


@dataclass(frozen=True, eq=False)
class ExactTeacher:
    """The teacher that has learnt both distributions perfectly, in one kind of output."""

    conditional: Mixture
    unconditional: Mixture
    prediction: Prediction = Prediction.V

    def __call__(self, z: Tensor, t: Tensor, condition: None = None) -> tuple[Tensor, Tensor]:
        return self._output(self.conditional, z, t), self._output(self.unconditional, z, t)

    def _output(self, data: Mixture, z: Tensor, t: Tensor) -> Tensor:
        return output_from(data.denoised(z, t), SCHEDULE.level(t, z), self.prediction)

    def flow(self, z: Tensor, guidance_scale: float, num_steps: int = 50, from_step: int = 0) -> Tensor:
        """Where `num_steps` guided DDIM steps take z [B, D] from timestep 999 to alpha_bar[0]."""
        denoise = guided_denoiser(self, SCHEDULE, self.prediction, guidance_scale)
        timesteps = trailing_timesteps(num_steps)[from_step:]
        return last_latent(solve(denoise, SCHEDULE, z, timesteps, ddim_step))


def matrix_power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    power_of_it: Tensor = vectors @ torch.diag(values**power) @ vectors.mT
    return power_of_it


def gaussian_flow(data: Mixture, z: Tensor, t: int, t_end: int | None) -> Tensor:
    """The exact flow of Gaussian data: whitened latents stay as they are.

    z(t) - signal mean, times the inverse root of z(t)'s covariance, is constant along the ODE.

    Args:
        t_end: None for clean data.
    """

    def signal_and_covariance(t: int | None) -> tuple[float, Tensor]:
        alpha_bar = 1.0 if t is None else SCHEDULE.alpha_bar[t].item()
        eye = torch.eye(len(data.covariance), dtype=torch.float64)
        return alpha_bar**0.5, alpha_bar * data.covariance + (1 - alpha_bar) * eye

    (signal, covariance), (signal_end, covariance_end) = (
        signal_and_covariance(t),
        signal_and_covariance(t_end),
    )
    whitened = (z - signal * data.means[0]) @ matrix_power(covariance, -0.5)
    return signal_end * data.means[0] + whitened @ matrix_power(covariance_end, 0.5)


def shifted(conditional: Mixture, unconditional: Mixture, w: float) -> Mixture:
    """The Gaussian whose unguided flow is the guided flow of two Gaussians of one covariance.

    Their epsilons differ by sigma * covariance_t^-1 * signal * (mean_u - mean_c), whatever z, so guidance by w moves
    the mean to mean_c + w * (mean_c - mean_u) and does nothing else.
    """
    means = conditional.means + w * (conditional.means - unconditional.means)
    return Mixture(means, conditional.weights, conditional.covariance)


def quantile_transport(data: Mixture, z: Tensor, t: int, t_end: int) -> Tensor:
    """The exact flow in one dimension: order is kept, so each latent keeps its quantile. No ODE is solved.

    Source: F_end^-1(F_t(z)) with F the cumulative distribution of the diffused mixture, inverted by bisection.
    """

    def cumulative(t: int) -> Callable[[Tensor], Tensor]:
        alpha_bar = SCHEDULE.alpha_bar[t]
        std = (alpha_bar * data.covariance[0, 0] + 1 - alpha_bar).sqrt()
        return lambda x: (
            torch.special.ndtr((x - alpha_bar.sqrt() * data.means[:, 0]) / std) @ data.weights
        )[:, None]

    quantile, end = cumulative(t)(z), cumulative(t_end)
    low, high = torch.full_like(z, -20.0), torch.full_like(z, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = end(middle) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())
