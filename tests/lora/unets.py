"""UNets of Stable Diffusion's layouts: the full-size configs, and tiny ones with the same module names."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""runwayml/stable-diffusion-v1-5, unet/config.json; what is not named is the library's default."""

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""stabilityai/stable-diffusion-xl-base-1.0, unet/config.json."""

TINY_SD = SD15 | {
    "sample_size": 8,
    "block_out_channels": (4, 8, 8, 8),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}

TINY_SDXL = SDXL | {
    "sample_size": 8,
    "block_out_channels": (4, 8, 8),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}

LCM_TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()
"""What the scripts that made the published LCM-LoRAs adapt."""


def unet(config: dict[str, Any], *, device: str = "cpu") -> UNet2DConditionModel:
    with torch.device(device):
        return UNet2DConditionModel(**config)


def sites(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
