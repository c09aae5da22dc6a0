"""The noise schedule: how much signal and how much noise a latent holds at each training timestep.

Owns the numbers alone: which timesteps a sampler visits is `timesteps`, how a network speaks of its output is
`prediction`. Knows no network and no request.
"""

# Shapes: T training timesteps, B rows of a batch; a latent is [B, ...].

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manylora.errors import ConfigError


@dataclass(frozen=True, eq=False)
class NoiseLevel:
    """z = signal * x0 + sigma * epsilon, for each row of a batch. Both broadcast against the latent."""

    signal: Tensor  # [B, 1, ...]  sqrt(alpha_bar)
    sigma: Tensor  # [B, 1, ...]  sqrt(1 - alpha_bar)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving schedule: signal^2 + sigma^2 = 1 at every timestep.

    Source:
        DDPM (Ho et al. 2020), equation 4; `alpha_bar` there and here is the product of 1 - beta.
    """

    alpha_bar: Tensor  # [T]  fp64, falling

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Return Stable Diffusion's schedule: the square root of beta rises linearly.

        Source:
            Latent diffusion (Rombach et al. 2022) as released; defaults are those of SD 1.x, 2.x and SDXL.
        """
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2)

    @classmethod
    def linear(
        cls, beta_start: float = 0.0001, beta_end: float = 0.02, num_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Return DDPM's schedule: beta rises linearly (Ho et al. 2020, section 4)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_timesteps))

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """Return the schedule of given betas [T], each in (0, 1)."""
        if betas.dim() != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ConfigError(f"betas must be one row of numbers in (0, 1), got shape {tuple(betas.shape)}")
        # The product is taken in fp32, as every published model was trained with it, and only then widened.
        return cls(torch.cumprod(1.0 - betas.to(torch.float32), dim=0).to(torch.float64))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Return the schedule that a diffusers `scheduler_config.json` describes.

        Settings that do not change the noise (spacing, offsets, clipping) belong to samplers and are not read here.

        Raises:
            ConfigError: a kind of betas that we do not have; names it and those we have.
        """
        if config.get("rescale_betas_zero_snr"):
            raise ConfigError(
                "rescale_betas_zero_snr is not supported: at a last timestep without any signal, neither x0 nor "
                "the consistency function follows from a predicted epsilon"
            )
        if config.get("trained_betas") is not None:
            return cls.from_betas(torch.tensor(config["trained_betas"], dtype=torch.float32))
        kinds = {"scaled_linear": cls.scaled_linear, "linear": cls.linear}
        kind = config.get("beta_schedule", "linear")  # diffusers' default, where a config leaves it out
        if kind not in kinds:
            raise ConfigError(f"beta_schedule {kind!r} is not supported; known: {', '.join(kinds)}")
        return kinds[kind](
            config.get("beta_start", 0.0001),
            config.get("beta_end", 0.02),
            config.get("num_train_timesteps", 1000),
        )

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    def level(self, t: Tensor, like: Tensor) -> NoiseLevel:
        """Return the noise level of each row.

        Args:
            t: [B] int64 timesteps in [0, T).
            like: [B, ...] the latent that the level will meet; gives device, number of axes, and the dtype, which is
                fp32 at least, since 1 - alpha_bar loses its digits in half precision.
        """
        alpha_bar = self.alpha_bar[t.to(self.alpha_bar.device)].reshape(-1, *[1] * (like.dim() - 1))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return NoiseLevel(
            alpha_bar.sqrt().to(like.device, dtype), (1.0 - alpha_bar).sqrt().to(like.device, dtype)
        )


def clean_level(like: Tensor) -> NoiseLevel:
    """Return the level of data itself, beyond the first timestep: all signal, no noise."""
    ones = torch.ones(
        (len(like), *[1] * (like.dim() - 1)),
        device=like.device,
        dtype=torch.promote_types(like.dtype, torch.float32),
    )
    return NoiseLevel(ones, torch.zeros_like(ones))


def add_noise(x0: Tensor, epsilon: Tensor, level: NoiseLevel) -> Tensor:
    """Return the noisy latent signal * x0 + sigma * epsilon [B, ...] (Ho et al. 2020, equation 4)."""
    return level.signal * x0 + level.sigma * epsilon
