"""Tiny complete pipelines with random weights, written as diffusers folders: for tests, docs and measurements.

They draw noise, not pictures; but every part is there and does what it does in the large ones: convolutions, cross
attention to a text encoder with its own tokenizer, SDXL's second encoder and time ids, the VAE, the noise schedule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from manylora.diffusion import Prediction

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_MAX_TOKENS = 24
_LATENT_SIZE = 8

_UNET: dict[str, Any] = {
    "sample_size": _LATENT_SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def tiny_sd(
    folder: str | Path, seed: int = 0, *, prediction: Prediction | str = Prediction.EPSILON
) -> Path:
    """Write a tiny StableDiffusionPipeline of 16 x 16 pixels, latents [4, 8, 8]; returns the folder.

    Args:
        prediction: what the UNet's output is taken for. A random UNet that predicts v follows tame trajectories.
    """
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            **_UNET,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
        )
        _strengthen(unet)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(16),
            tokenizer=tiny_clip_tokenizer(),
            unet=unet,
            scheduler=_noise_schedule(prediction),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _saved(pipeline, folder)


def tiny_sdxl(
    folder: str | Path, seed: int = 0, *, prediction: Prediction | str = Prediction.EPSILON
) -> Path:
    """Write a tiny StableDiffusionXLPipeline: two text encoders, time ids, three stages of two layers as SDXL's."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        second = _text_encoder(8, projection=12)
        unet = diffusers.UNet2DConditionModel(
            **_UNET,
            block_out_channels=(4, 8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            cross_attention_dim=16 + 8,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        )
        _strengthen(unet)
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(16),
            text_encoder_2=second,
            tokenizer=tiny_clip_tokenizer(),
            tokenizer_2=tiny_clip_tokenizer(),
            unet=unet,
            scheduler=_noise_schedule(prediction),
            add_watermarker=False,
        )
    return _saved(pipeline, folder)


def tiny_clip_tokenizer() -> Any:
    """Return a tokenizer of CLIP's kind whose tokens are bytes, each once inside a word and once at its end."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), _BOS, _EOS]
    # transformers 5 takes the length from here and not from the vocabulary; left out, padding would have no end.
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_EOS,
        model_max_length=_MAX_TOKENS,
    )


def _text_encoder(width: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tiny_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()


def _vae() -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * _LATENT_SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    ).eval()


def _strengthen(unet: Any) -> None:
    """Make the text matter: torch's initial weights would let a hundredth of it through two projections."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
                parameter.mul_(3.0)
    unet.eval()


def _noise_schedule(prediction: Prediction | str) -> Any:
    import diffusers

    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=str(Prediction(prediction)),
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # has no effect on trailing timesteps; the pipeline rewrites configs without it
    )


def _saved(pipeline: Any, folder: str | Path) -> Path:
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return Path(folder)
