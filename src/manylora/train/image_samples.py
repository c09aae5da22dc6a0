"""Grids of samples: what the model draws at this moment, a row for the base and one for the adapter."""

# Shapes: N pictures, H and W pixels.

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.diffusion import ddim_step, last_latent, solve, trailing_timesteps
from manylora.errors import ConfigError
from manylora.models.diffusion_base import Condition, DiffusionBase
from manylora.train.image_encoded import EncodedPictures
from manylora.train.image_loss import generator_for
from manylora.train.image_pixels import to_pixels


def sample_prompts(path: Path | None, data: EncodedPictures, rows: Sequence[int], count: int) -> list[str]:
    """Return the prompts of the file, a line each, or captions of the rows, evenly spread over them.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if path is None:
        captions = list(dict.fromkeys(data.captions[data.caption_rows[row]] for row in rows))
        chosen = np.linspace(0, len(captions) - 1, min(count, len(captions))).astype(int)
        return [captions[index] for index in chosen]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sample_prompts {path} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"sample_prompts {path} holds no prompt; expected one a line")
    return prompts[:count]


@torch.no_grad()
def draw_samples(
    base: DiffusionBase, condition: Condition, size: int, num_steps: int, guidance_scale: float, seed: int
) -> NDArray[np.uint8]:  # [N, H, W, 3]
    """Draw one picture for each row of the condition with DDIM; the same noise for a row at every call."""
    noise = _noise(base, len(condition), size, seed)
    if guidance_scale == 1.0:
        denoise = base.denoiser(condition)
    else:
        nothing = base.unconditional(height=size, width=size)
        denoise = base.guided_denoiser(condition, nothing, guidance_scale)
    timesteps = trailing_timesteps(num_steps, base.schedule.num_timesteps)
    return to_pixels(
        base.decode_latents(last_latent(solve(denoise, base.schedule, noise, timesteps, ddim_step)))
    )


def save_grid(rows: Sequence[NDArray[np.uint8]], path: Path) -> None:
    """Write rows of pictures, each [N, H, W, 3], as one PNG."""
    from PIL import Image

    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def _noise(base: DiffusionBase, count: int, size: int, seed: int) -> Tensor:
    """Where sampling starts [count, 4, h, w]; a picture's noise does not depend on the count."""
    shape = base.latent_shape(size, size)
    drawn = [torch.randn(shape, generator=generator_for(seed, "sample", index)) for index in range(count)]
    return torch.stack(drawn).to(base.device)
