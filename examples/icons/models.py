"""The parts of the base, in Stable Diffusion's layout but small, and how they are put together as a pipeline."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from icons.scenes import SIZE
from manylora.training.hardware import Precision

LATENT_CHANNELS = 4
LATENT_SIZE = SIZE // 4
"""The VAE halves the side twice."""


@dataclass(frozen=True)
class ModelSize:
    """Widths of the three networks; the defaults are the base's, tests use less."""

    vae_channels: tuple[int, ...] = (32, 64, 64)
    unet_channels: tuple[int, ...] = (64, 128, 192)
    unet_heads: int = 4
    text_width: int = 128
    text_layers: int = 3
    norm_groups: int = 16


def make_vae(size: ModelSize) -> AutoencoderKL:
    """Return an untrained VAE: [B, 3, 64, 64] in [-1, 1] to moments of [B, 4, 16, 16] and back."""
    levels = len(size.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=size.vae_channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=min(8, size.norm_groups),
        sample_size=SIZE,
        # quant_conv carries the normalisation (latents.py), so latents need no factor outside the VAE.
        scaling_factor=1.0,
        force_upcast=False,
    )


def make_text_encoder(size: ModelSize, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder for this tokenizer: [B, L] token ids to [B, L, text_width]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            projection_dim=size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            # CLIP's defaults are ids of CLIP's own vocabulary, which lie outside this one.
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(size: ModelSize) -> UNet2DConditionModel:
    """Return an untrained UNet: latents [B, 4, 16, 16], timesteps [B], text [B, L, text_width] to v [B, 4, 16, 16]."""
    crosses = len(size.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        # No attention at 16x16: it would cost as much as all the rest.
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * crosses),
        up_block_types=(*("CrossAttnUpBlock2D",) * crosses, "UpBlock2D"),
        block_out_channels=size.unet_channels,
        layers_per_block=1,
        cross_attention_dim=size.text_width,
        attention_head_dim=size.unet_heads,  # diffusers' name for the number of heads here
        norm_num_groups=size.norm_groups,
    )


def make_noise_schedule() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule with v-prediction, and DDIM on the grid that distillation uses."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # has no effect on trailing timesteps; the pipeline rewrites configs without it
    )


def make_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Return the parts as a diffusers pipeline."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_vae(folder: Path) -> AutoencoderKL:
    """Read a VAE and freeze it."""
    vae = AutoencoderKL.from_pretrained(folder).eval()
    vae.requires_grad_(False)
    return vae


def fastest_precision() -> Precision:
    """Return bf16 where this CPU has units for its products (AMX): a step takes 0.6 of the time. Elsewhere fp32."""
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


@contextmanager
def computing_in(precision: Precision) -> Iterator[None]:
    """Compute products on the CPU in this precision; weights, optimizer and losses stay fp32."""
    if precision == "fp32":
        yield
        return
    # torch's fused attention takes a quarter of the step in bf16 backward; as plain products it is hardly seen.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def num_parameters(modules: Iterable[nn.Module]) -> int:
    """Count the parameters of all modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())


def generator(seed: int, *position: int) -> torch.Generator:
    """Return a generator for one place of a run (a step, an epoch): a continued run draws what it would have drawn."""
    mixed = seed
    for number in position:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(mixed)


def nothing_but(settings: dict[str, Any], excluded: Iterable[str]) -> dict[str, Any]:
    """Return settings without those excluded, lists for tuples, as JSON gives them back."""
    kept = {name: value for name, value in settings.items() if name not in set(excluded)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
