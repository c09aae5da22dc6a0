"""Random adapters for a base, and how far two pictures are apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn

from manylora.image.output import Picture
from manylora.lora.adapter import Adapter, LoraPair
from manylora.models.diffusion_base import DiffusionBase
from tests.lora.unets import LCM_TARGETS

TEXT_TARGETS = ("q_proj", "v_proj", "out_proj", "fc1")


def random_adapter(base: DiffusionBase, seed: int, *, rank: int = 4, text: bool = False) -> Adapter:
    """An adapter on all sites of an LCM-LoRA, convs included; with `text`, on the text encoders too."""
    draw = torch.Generator().manual_seed(seed)
    sites = {}
    for name, module in _modules(base, text):
        targets = TEXT_TARGETS if name.startswith("text_encoder") else LCM_TARGETS
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if not any(name.endswith(f".{target}") for target in targets):
            continue
        weight = module.weight.flatten(1)
        a = torch.randn(rank, weight.shape[1], generator=draw) / weight.shape[1] ** 0.5
        b = torch.randn(weight.shape[0], rank, generator=draw) * 0.3
        kernel = tuple(module.kernel_size) if isinstance(module, nn.Conv2d) else None
        sites[name] = LoraPair(a, b, 0.5, kernel)  # type: ignore[arg-type]  # of two
    return Adapter(sites, name=f"random-{seed}")


def _modules(base: DiffusionBase, text: bool) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the networks, by the names that files of diffusers and kohya have for them."""
    yield from base.unet.named_modules()
    for encoder, prefix in zip(base.text_encoders, ("text_encoder", "text_encoder_2"), strict=False):
        for name, module in encoder.named_modules() if text else ():
            yield f"{prefix}.text_model.{name.removeprefix('text_model.')}", module


def values(picture: Picture | Image.Image) -> np.ndarray:  # [H, W, 3]  int64
    image = picture.image if isinstance(picture, Picture) else picture
    assert image is not None, picture
    return np.asarray(image).astype(np.int64)


def largest_difference(a: Picture | Image.Image, b: Picture | Image.Image) -> int:
    """Of 255."""
    return int(np.abs(values(a) - values(b)).max())
