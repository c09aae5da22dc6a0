"""What a network's output means: the noise, the data, or the velocity between them, and how to go from one to another.

Everything beyond this file speaks of `Denoised` alone and need not know how the network was trained.
"""

# Shapes: B rows of a batch; outputs and latents are [B, ...].

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from manylora.diffusion.schedule import NoiseLevel
from manylora.errors import ConfigError


class Prediction(StrEnum):
    """What the network was trained to put out; the values are diffusers' `prediction_type`."""

    EPSILON = "epsilon"
    V = "v_prediction"
    X0 = "sample"

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Prediction:
        """Return what a diffusers `scheduler_config.json` says; epsilon where it says nothing, as there.

        Raises:
            ConfigError: a kind that we do not have.
        """
        kind = config.get("prediction_type", "epsilon")
        if kind not in list(cls):
            raise ConfigError(f"prediction_type {kind!r} is not supported; known: {', '.join(cls)}")
        return cls(kind)


@dataclass(frozen=True, eq=False)
class Denoised:
    """A noisy latent taken apart: z = signal * x0 + sigma * epsilon."""

    x0: Tensor  # [B, ...]
    epsilon: Tensor  # [B, ...]


def denoised_from(output: Tensor, z: Tensor, level: NoiseLevel, kind: Prediction) -> Denoised:
    """Take the latent apart by the network's output.

    Args:
        output: [B, ...] of the network at `z`, in the dtype it likes; the result has z's, fp32 at least.
    Source:
        epsilon: DDPM (Ho et al. 2020), equation 4 solved for x0; v = signal * epsilon - sigma * x0: progressive
        distillation (Salimans & Ho 2022), appendix D.
    """
    signal, sigma = level.signal, level.sigma
    output = output.to(signal.dtype)
    match kind:
        case Prediction.EPSILON:
            return Denoised((z - sigma * output) / signal, output)
        case Prediction.X0:
            return Denoised(output, (z - signal * output) / sigma)
        case Prediction.V:
            return Denoised(signal * z - sigma * output, sigma * z + signal * output)


def output_from(denoised: Denoised, level: NoiseLevel, kind: Prediction) -> Tensor:
    """Return the output [B, ...] with which a network of this kind says `denoised`: its training target."""
    match kind:
        case Prediction.EPSILON:
            return denoised.epsilon
        case Prediction.X0:
            return denoised.x0
        case Prediction.V:
            return level.signal * denoised.epsilon - level.sigma * denoised.x0
