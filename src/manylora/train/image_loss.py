"""The loss of denoising, picture by picture. Pure functions of tensors; knows no network and no adapter."""

# Shapes: B pictures of a batch; latents and outputs are [B, 4, h, w].

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from manylora.diffusion import Denoised, NoiseLevel, NoiseSchedule, Prediction, output_from


@dataclass(frozen=True, eq=False)
class Draw:
    """What chance decides about a batch."""

    timesteps: Tensor  # [B] int64
    noise: Tensor  # [B, 4, h, w]
    is_dropped: Tensor  # [B] bool, whether the caption is left away


def draw(
    latents: Tensor, schedule: NoiseSchedule, caption_dropout: float, generator: torch.Generator
) -> Draw:
    """Draw timestep, noise and dropped captions of a batch; the generator lives on the CPU."""
    num_rows = len(latents)
    return Draw(
        torch.randint(schedule.num_timesteps, (num_rows,), generator=generator),
        torch.randn(latents.shape, generator=generator),
        torch.rand(num_rows, generator=generator) < caption_dropout,
    )


def even_draw(latents: Tensor, schedule: NoiseSchedule, share: float, generator: torch.Generator) -> Draw:
    """Return a draw that judges: timesteps evenly spread over the pictures, no caption dropped.

    Args:
        share: in [0, 1), of the way from one timestep to the next picture's; other shares fill the gaps.
    """
    num_rows = len(latents)
    spread = (torch.arange(num_rows) + share) / num_rows
    return Draw(
        (spread * schedule.num_timesteps).long(),
        torch.randn(latents.shape, generator=generator),
        torch.zeros(num_rows, dtype=torch.bool),
    )


def picture_losses(
    output: Tensor, latents: Tensor, noise: Tensor, level: NoiseLevel, kind: Prediction
) -> Tensor:  # [B]
    """Return the mean squared error of each picture's network output."""
    wanted = output_from(Denoised(latents, noise), level, kind)
    return (output.to(wanted.dtype) - wanted).square().flatten(1).mean(1)


def min_snr_weights(level: NoiseLevel, kind: Prediction, gamma: float) -> Tensor:  # [B]
    """Return the weights with which the loss on any output is min(SNR, gamma) times the loss on the data.

    Source:
        Efficient diffusion training via min-SNR weighting (Hang et al. 2023), section 3.4; the loss on epsilon is SNR
        times that on x0, the loss on v is SNR + 1 times.
    """
    snr = (level.signal / level.sigma).square().flatten()
    capped = snr.clamp(max=gamma)
    match kind:
        case Prediction.EPSILON:
            return capped / snr
        case Prediction.X0:
            return capped
        case Prediction.V:
            return capped / (snr + 1.0)


def generator_for(seed: int, *position: object) -> torch.Generator:
    """Return a generator of one place of a run (a step, a picture): a continued run draws what it would have drawn."""
    place = "/".join(map(str, (seed, *position)))
    mixed = int.from_bytes(blake2b(place.encode(), digest_size=7).digest(), "little")
    return torch.Generator().manual_seed(mixed)
