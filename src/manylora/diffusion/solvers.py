"""One step of the probability-flow ODE, from one noise level to a lower one. Pure functions of tensors.

Each takes levels instead of timesteps, so that rows of a batch may stand at different timesteps and step differently
far, and so that the last step may end at alpha_bar[0] or at clean data, as the caller says.
"""

# Shapes: B rows of a batch; latents are [B, ...].

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.diffusion.prediction import Denoised
from manylora.diffusion.schedule import NoiseLevel, add_noise


@dataclass(frozen=True, eq=False)
class PastStep:
    """The evaluation before the present one: what a multistep solver extrapolates from."""

    x0: Tensor  # [B, ...]
    level: NoiseLevel


@dataclass(frozen=True, eq=False)
class StepStart:
    """Where a step of a multistep solver began: what UniPC needs to correct it afterwards."""

    z: Tensor  # [B, ...]
    x0: Tensor  # [B, ...]  the data as seen from there
    level: NoiseLevel
    past: PastStep | None
    """What the step extrapolated from; None for a step of first order."""


Solver = Callable[[Tensor, Denoised, NoiseLevel, NoiseLevel, PastStep | None], Tensor]
"""(z, z taken apart, its level, the level to reach, the past evaluation) -> z at the level reached."""


def ddim_step(
    z: Tensor, now: Denoised, level: NoiseLevel, to: NoiseLevel, past: PastStep | None = None
) -> Tensor:
    """Noise the predicted data again, less and with the predicted noise. First order; looks at no past.

    Source:
        DDIM (Song et al. 2021), equation 12 with sigma_t = 0.
    """
    return add_noise(now.x0, now.epsilon, to)


def euler_step(
    z: Tensor, now: Denoised, level: NoiseLevel, to: NoiseLevel, past: PastStep | None = None
) -> Tensor:
    """Follow the slope dx/ds in x = z / signal, s = sigma / signal, along which the ODE is least curved.

    First order; looks at no past. In exact arithmetic it equals `ddim_step`: that is Euler's method in these
    coordinates.

    Source:
        Elucidating the design space (Karras et al. 2022), algorithm 1 without its correction.
    """
    x, s, s_to = z / level.signal, level.sigma / level.signal, to.sigma / to.signal
    slope = (x - now.x0) / s
    return to.signal * (x + (s_to - s) * slope)


def dpm_solver_pp_2m_step(
    z: Tensor, now: Denoised, level: NoiseLevel, to: NoiseLevel, past: PastStep | None = None
) -> Tensor:
    """Solve the linear part of the ODE exactly and extrapolate x0 linearly in lambda = log(signal / sigma).

    Second order; first order (and equal to `ddim_step`) without a past, which a step to clean data must not have,
    since lambda is infinite there.

    Source:
        DPM-Solver++ (Lu et al. 2022), algorithm 2, in the midpoint form of its released code.
    """
    x0 = now.x0 if past is None else _extrapolated(now.x0, level, to, past)
    shrinkage = (to.sigma * level.signal) / (to.signal * level.sigma)  # exp(-h), h the growth of lambda
    return (to.sigma / level.sigma) * z - to.signal * (shrinkage - 1.0) * x0


def unipc_correction(start: StepStart, x0_there: Tensor, to: NoiseLevel) -> Tensor:
    """Return the latent that a step should have reached, now that the network has been asked where it landed.

    Beside what the step itself extrapolated from, x0 at its end is known here, which raises the order by one without
    a further call of the network. The step that it corrects is `dpm_solver_pp_2m_step`: UniPC's predictor of order 2
    with B(h) = expm1(-h), "bh2", is the same formula, and so is its first order, without a past.

    Args:
        start: where the step began.
        x0_there: [B, ...] the data as seen from where the step landed, before correction.
        to: the level there; not clean data, where lambda is infinite.
    Source:
        UniPC (Zhao et al. 2023), algorithm 1, UniC of the order of the step, with predicted data; equal to diffusers'
        UniPCMultistepScheduler(solver_order=2, solver_type="bh2").
    """
    level, past = start.level, start.past
    h = _log_snr(to) - _log_snr(level)
    decay = torch.expm1(-h)
    change = x0_there - start.x0
    if past is None:
        x0 = start.x0 + 0.5 * change
    else:
        # Weights of the two differences that make the step exact for x0 quadratic in lambda: the paper's R rho = b.
        ratio = (_log_snr(past.level) - _log_snr(level)) / h
        b_1 = -1.0 / h - 1.0 / decay
        b_2 = (2.0 * (b_1 * decay) / -h - 1.0) / decay
        rho = (b_1 - b_2) / (1.0 - ratio)
        x0 = start.x0 + rho * (past.x0 - start.x0) / ratio + (b_1 - rho) * change
    return (to.sigma / level.sigma) * start.z - to.signal * decay * x0


def _extrapolated(x0: Tensor, level: NoiseLevel, to: NoiseLevel, past: PastStep) -> Tensor:
    h_past = _log_snr(level) - _log_snr(past.level)
    h = _log_snr(to) - _log_snr(level)
    return x0 + 0.5 * (h / h_past) * (x0 - past.x0)


def _log_snr(level: NoiseLevel) -> Tensor:
    """lambda, half the logarithm of the signal-to-noise ratio."""
    return (level.signal / level.sigma).log()
