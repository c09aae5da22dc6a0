"""What the base's training changes: UNet and text encoder, the average of their weights, and the loss.

Shapes: B pictures of a batch, L tokens of a caption, latents [B, 4, 16, 16].
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from icons.captions import token_ids
from icons.latents import LatentSplit
from icons.models import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    ModelSize,
    generator,
    make_noise_schedule,
    make_pipeline,
    make_text_encoder,
    make_unet,
)


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, so that both train, average and are stored together."""

    def __init__(self, size: ModelSize, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(size, tokenizer)
        self.unet = make_unet(size)

    def forward(
        self,
        noisy: Tensor,  # [B, 4, 16, 16]
        timesteps: Tensor,  # [B]  int64, 0..999
        tokens: Tensor,  # [B, L]  int64
    ) -> Tensor:  # [B, 4, 16, 16]  v
        return self.unet(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample


class Student:
    """The denoiser in training and its average."""

    def __init__(self, size: ModelSize, tokenizer: CLIPTokenizer, seed: int) -> None:
        torch.manual_seed(seed)
        self.tokenizer = tokenizer
        self.denoiser = Denoiser(size, tokenizer).train()
        self.average = deepcopy(self.denoiser).eval().requires_grad_(False)
        self.alpha_bar = make_noise_schedule().alphas_cumprod  # [1000]
        self.empty_caption = torch.from_numpy(token_ids(tokenizer, [""]))[0]  # [L]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.denoiser.named_parameters())

    @property
    def averaged_tensors(self) -> dict[str, Tensor]:
        """The average by name, for checkpoints."""
        return {f"average.{name}": p for name, p in self.average.named_parameters()}

    @torch.no_grad()
    def update_average(self, step: int, decay: float) -> None:
        """Move the average towards the weights after `step` steps; early steps move it faster."""
        decay = min(decay, (1 + step) / (10 + step))
        theirs, ours = list(self.denoiser.parameters()), list(self.average.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return (z_t, v): z_t = alpha z + sigma noise, v = alpha noise - sigma z (Salimans and Ho 2022)."""
        alpha_bar = self.alpha_bar[timesteps][:, None, None, None]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return alpha * latents + sigma * noise, alpha * noise - sigma * latents

    def loss(
        self,
        split: LatentSplit,
        rows: Sequence[int],
        draw: torch.Generator,
        dropout: float,
        denoiser: Denoiser | None = None,
    ) -> Tensor:
        """Return the mean squared error of v over the rows, at random timesteps.

        Args:
            dropout: share of captions replaced by the empty one, which guidance needs.
            denoiser: whose loss; by default the one in training.
        """
        latents = torch.from_numpy(split.latents[rows]).float()
        tokens = torch.from_numpy(split.tokens[rows])
        noise = torch.randn(latents.shape, generator=draw)
        timesteps = torch.randint(len(self.alpha_bar), (len(latents),), generator=draw)
        dropped = torch.rand(len(latents), generator=draw) < dropout
        tokens = torch.where(dropped[:, None], self.empty_caption, tokens)
        noisy, v = self.noised(latents, noise, timesteps)
        return nn.functional.mse_loss((denoiser or self.denoiser)(noisy, timesteps, tokens).float(), v)

    @torch.no_grad()
    def held_out_loss(self, split: LatentSplit, rows: Sequence[int], seed: int) -> float:
        """Return the average's loss over rows, with the same noise and timesteps at every call."""
        parts = [rows[start : start + 64] for start in range(0, len(rows), 64)]
        losses = [
            self.loss(split, part, generator(seed, index), 0.0, self.average).item() * len(part)
            for index, part in enumerate(parts)
        ]
        return sum(losses) / len(rows)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """Return the average as a diffusers pipeline."""
        return make_pipeline(vae, self.average.text_encoder, self.tokenizer, self.average.unet)


def starting_noise(count: int, seed: int) -> Tensor:
    """Return [count, 4, 16, 16]; picture i's noise does not depend on count."""
    shape = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return torch.stack([torch.randn(shape, generator=generator(seed, index)) for index in range(count)])
