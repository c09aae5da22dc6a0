"""A latent diffusion model of Stable Diffusion's or SDXL's layout: its networks, and what they say to each other.

Owns the way from texts and pictures to conditions and latents and back. Knows no adapter, sampler, request or training.
The denoising network runs as it is, so whatever hangs on its modules (attached adapters, PEFT's layers) takes part.
"""

# Shapes: N rows, L tokens of a prompt, C width of the text embeddings, P of the pooled one, H and W pixels,
# h and w latent pixels.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manylora.diffusion import (
    Denoiser,
    Network,
    PairNetwork,
    denoiser,
    guided_denoiser,
)
from manylora.errors import ConfigError
from manylora.models.device import usable_device
from manylora.models.diffusion_parts import DiffusionParts, load_parts
from manylora.models.fingerprint import weights_hash

Kind = Literal["sd", "sdxl"]

# A tokenizer sets its padding and truncation by call and keeps them, so that calls of two threads would mix theirs. One
# lock for all models: they seldom wait for each other, and a model that had its own could not be copied.
_TOKENIZING = Lock()


@dataclass(frozen=True, eq=False)
class Condition:
    """What a UNet is told beside the latent, one row a picture. No gradient flows into it."""

    embeddings: Tensor  # [N, L, C]
    pooled: Tensor | None = None  # [N, P]  SDXL only
    time_ids: Tensor | None = (
        None  # [N, 6]  SDXL only: original height, width, crop's top, left, height, width
    )

    def __len__(self) -> int:
        return len(self.embeddings)

    def rows(self, index: Sequence[int] | Tensor | slice) -> Condition:
        """Return the condition of some rows, in the order of `index`."""
        index = index if isinstance(index, Tensor | slice) else torch.tensor(index, dtype=torch.int64)
        return Condition(*(None if t is None else t[index] for t in self._tensors()))  # type: ignore[arg-type]

    def expand(self, num_rows: int) -> Condition:
        """Return the one row `num_rows` times."""
        if len(self) != 1:
            raise ConfigError(f"only a condition of one row can be expanded, got {len(self)} rows")
        return self.rows([0] * num_rows)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        return Condition(*(None if t is None else t.to(device, dtype) for t in self._tensors()))  # type: ignore[arg-type]

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Return the rows of all parts one after another."""
        columns = zip(*(part._tensors() for part in parts), strict=True)
        joined = (None if column[0] is None else torch.cat(column) for column in columns)
        return Condition(*joined)  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.embeddings, self.pooled, self.time_ids


def run_unet(unet: nn.Module, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Return the output of a UNet [N, 4, h, w], in its dtype.

    Args:
        z: [N, 4, h, w] latents, t: [N] int64 timesteps.
    """
    dtype = next(unet.parameters()).dtype
    condition = condition.to(z.device, dtype)
    added = None
    if condition.pooled is not None:
        added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    output: Tensor = unet(
        z.to(dtype),
        t,
        encoder_hidden_states=condition.embeddings,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output


def run_unet_pair(
    unet: nn.Module, z: Tensor, t: Tensor, condition: Condition, unconditional: Condition
) -> tuple[Tensor, Tensor]:
    """Return the outputs (conditional, unconditional), each [N, 4, h, w], of one pass over 2 N rows.

    Args:
        unconditional: of N rows, or of one for all.
    """
    if len(unconditional) != len(z):
        unconditional = unconditional.expand(len(z))
    both = run_unet(unet, torch.cat([z, z]), torch.cat([t, t]), Condition.cat([condition, unconditional]))
    conditional_output, unconditional_output = both.chunk(2)
    return conditional_output, unconditional_output


@dataclass(frozen=True, eq=False)
class DiffusionBase(DiffusionParts):
    """The networks of one model, and what is known of them."""

    kind: Kind
    default_size: int
    """Side of the pictures that it was trained on, in pixels."""
    path: str
    """The folder or hub id that it was loaded from."""

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device  # type: ignore[no-any-return]

    @property
    def latent_factor(self) -> int:
        """Pixels of a picture's side for one of the latent's."""
        return _latent_factor(self.vae)

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return [channels, h, w] of the latent of a picture; `default_size` where no size is given.

        Raises:
            ConfigError: the latent would not halve evenly through the UNet.
        """
        step = self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        sides = (height or self.default_size, width or self.default_size)
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < step or side % step:
                raise ConfigError(
                    f"{name} must be a multiple of {step} pixels for '{self.path}', got {side}; "
                    f"it was trained at {self.default_size}"
                )
        return self.latent_channels, sides[0] // self.latent_factor, sides[1] // self.latent_factor

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Encode texts as the model's diffusers pipeline does; what is longer than the encoder takes is cut.

        Args:
            height, width: pixels of the picture to be made, which SDXL is told; `default_size` by default.
        """
        if self.kind == "sd":
            return Condition(self._sd_embeddings(prompts))
        hidden: list[Tensor] = []
        pooled: Tensor | None = None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens, _ = self._tokens(tokenizer, prompts)
            encoded = encoder(tokens, output_hidden_states=True)
            # The last but one layer's, without the norm after the last: SDXL was trained so.
            hidden.append(encoded.hidden_states[-2])
            pooled = encoded[0]
        return Condition(torch.cat(hidden, dim=-1), pooled, self._time_ids(len(prompts), height, width))

    def cut_off(self, prompt: str) -> str:
        """Return the end of a prompt that `encode_prompts` would cut; "" if it fits."""
        for tokenizer in self.tokenizers:
            with _TOKENIZING:
                # Between the marks of beginning and end.
                tokens = tokenizer(prompt, verbose=False).input_ids
            if len(tokens) > tokenizer.model_max_length:
                cut: str = tokenizer.decode(tokens[tokenizer.model_max_length - 1 : -1])
                return cut
        return ""

    @torch.no_grad()
    def unconditional(self, *, height: int | None = None, width: int | None = None) -> Condition:
        """Return the one-row condition of no prompt, which guidance leads away from."""
        empty = self.encode_prompts([""], height=height, width=width)
        if not self.empty_is_zero:
            return empty
        pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
        return Condition(torch.zeros_like(empty.embeddings), pooled, empty.time_ids)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents [N, 4, h, w], fp32, scaled as the UNet takes them.

        Args:
            pixels: [N, 3, H, W] in [-1, 1].
            generator: draws from the encoder's distribution; None takes its mean.
        """
        parameter = next(self.vae.parameters())
        posterior = self.vae.encode(pixels.to(parameter.device, parameter.dtype)).latent_dist
        latents = posterior.mean if generator is None else posterior.sample(generator)
        mean, spread = self._latent_statistics(latents)
        scaled: Tensor = (latents.float() - mean) / spread
        return scaled

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels [N, 3, H, W], fp32, in [-1, 1] but for the decoder's overshoot.

        Args:
            latents: [N, 4, h, w], scaled as the UNet gives them.
        """
        parameter = next(self.vae.parameters())
        mean, spread = self._latent_statistics(latents)
        raw = (latents.float() * spread + mean).to(parameter.device, parameter.dtype)
        pixels: Tensor = self.vae.decode(raw, return_dict=False)[0]
        return pixels.float()

    def network(self, condition: Condition) -> Network:
        """Return the UNet with a condition inside: (z [N, 4, h, w], t [N]) to its raw output."""
        return lambda z, t: run_unet(self.unet, z, t, condition)

    def pair_network(self, condition: Condition, unconditional: Condition) -> PairNetwork:
        """Return the UNet with and without its condition, both in one pass."""
        return lambda z, t: run_unet_pair(self.unet, z, t, condition, unconditional)

    def denoiser(self, condition: Condition) -> Denoiser:
        """Return what samplers ask, without guidance. It keeps gradients where they are wanted."""
        return denoiser(self.network(condition), self.schedule, self.prediction)

    def guided_denoiser(
        self, condition: Condition, unconditional: Condition, guidance_scale: float
    ) -> Denoiser:
        """Return what samplers ask, guided away from `unconditional` (a negative prompt, or `self.unconditional()`)."""
        pair = self.pair_network(condition, unconditional)
        return guided_denoiser(pair, self.schedule, self.prediction, guidance_scale)

    def content_hash(self) -> str:
        """Hex hash of the UNet's weights as loaded; what an adapter's file says it was made for."""
        return weights_hash(self.unet)

    def _sd_embeddings(self, prompts: Sequence[str]) -> Tensor:
        (tokenizer,), (encoder,) = self.tokenizers, self.text_encoders
        tokens, mask = self._tokens(tokenizer, prompts)
        # Padding is seen by the encoders of most models, which were trained so; a few say in their config not to.
        used = mask if getattr(encoder.config, "use_attention_mask", False) else None
        hidden: Tensor = encoder(tokens, attention_mask=used)[0]
        return hidden

    def _tokens(self, tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, each [N, L]."""
        with _TOKENIZING:
            encoded = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
        return encoded.input_ids.to(self.device), encoded.attention_mask.to(self.device)

    def _time_ids(self, num_rows: int, height: int | None, width: int | None) -> Tensor:
        size = (height or self.default_size, width or self.default_size)
        row = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=self.device)
        return row.expand(num_rows, -1).contiguous()

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(mean, spread) of the VAE's raw latents: scaled = (raw - mean) / spread."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return getattr(config, "shift_factor", None) or 0.0, 1.0 / config.scaling_factor
        # As diffusers' SDXL pipeline: by channel, and the factor on top.
        mean_C, std_C = (torch.tensor(values, device=latents.device) for values in (mean, std))
        return mean_C.view(1, -1, 1, 1), std_C.view(1, -1, 1, 1) / config.scaling_factor


def load_diffusion_base(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiffusionBase:
    """Load a model in diffusers' layout; only safetensors are read, and no code that comes with a model is run.

    Args:
        source: a folder with model_index.json, or a hub id ("org/name").
        dtype: of the networks. The VAE stays in float32 where its config says that it overflows in less.
    Raises:
        ModelError: no such model, or not one of SD's or SDXL's layout; says what was expected and what came.
        ConfigError: a device that is not there.
    """
    parts = load_parts(source, dtype=dtype, device=usable_device(device))
    return DiffusionBase(
        **vars(parts),
        kind="sd" if len(parts.text_encoders) == 1 else "sdxl",
        default_size=_side(parts),
        path=str(source),
    )


def _side(parts: DiffusionParts) -> int:
    """Pixels of the pictures that the UNet was trained on: its latents' side times the VAE's factor."""
    size = parts.unet.config.sample_size
    return int((size if isinstance(size, int) else min(size)) * _latent_factor(parts.vae))


def _latent_factor(vae: Any) -> int:
    """Every level of the encoder but the last halves the side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))
