"""Classifier-free guidance, and the two ways of asking a network: with its condition alone, or guided.

The only place where a guidance scale becomes a weight: `w = guidance_scale - 1`.
"""

# Shapes: B rows of a batch; latents are [B, ...].

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from manylora.diffusion.prediction import Denoised, Prediction, denoised_from
from manylora.diffusion.schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Denoised]
"""(z [B, ...], t [B] int64) -> z taken apart. What every sampler asks, and all that it asks."""

Network = Callable[[Tensor, Tensor], Tensor]
"""(z [B, ...], t [B] int64) -> output [B, ...], with the condition already inside."""

PairNetwork = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z, t) -> outputs (conditional, unconditional), each [B, ...]; one pass over a batch of 2 B rows, if it can."""


def guidance_weight(guidance_scale: float) -> float:
    """Return LCM's w for the guidance scale that pipelines and papers on samplers state.

    w = guidance_scale - 1: w = 0 and guidance_scale = 1 are both "no guidance".

    Source:
        Latent consistency models (Luo et al. 2023), section 4.2, have (1 + w) * conditional - w * unconditional; SD
        pipelines have unconditional + guidance_scale * (conditional - unconditional).
    """
    return guidance_scale - 1.0


def guide(conditional: Denoised, unconditional: Denoised, w: Tensor | float) -> Denoised:
    """Return conditional + w * (conditional - unconditional), for x0 and epsilon alike.

    Args:
        w: one weight, or one for each row, shaped to broadcast: [B, 1, ...].
    Source:
        Classifier-free guidance (Ho & Salimans 2022), equation 6. Each of x0, epsilon and v is affine in the other
        at given z, and the weights 1 + w and -w add up to 1, so guiding one guides all.
    """
    return Denoised(
        conditional.x0 + w * (conditional.x0 - unconditional.x0),
        conditional.epsilon + w * (conditional.epsilon - unconditional.epsilon),
    )


def denoiser(network: Network, schedule: NoiseSchedule, kind: Prediction) -> Denoiser:
    """Return the denoiser of a network, without guidance."""

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        return denoised_from(network(z, t), z, schedule.level(t, z), kind)

    return denoise


def guided_denoiser(
    network: PairNetwork, schedule: NoiseSchedule, kind: Prediction, guidance_scale: float
) -> Denoiser:
    """Return the denoiser of a network that is guided by `guidance_scale` (1.0 changes nothing but the cost)."""
    w = guidance_weight(guidance_scale)

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        level = schedule.level(t, z)
        conditional, unconditional = (denoised_from(output, z, level, kind) for output in network(z, t))
        return guide(conditional, unconditional, w)

    return denoise
