"""Between pictures and the tensors of a VAE. Knows no model."""

# Shapes: H x W pixels; values of a VAE's pixels lie in -1..1.

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """Return the picture in this size [3, H, W], fp32 in -1..1. What is transparent becomes white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    rgb = image.convert("RGB")
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(rgb, dtype=np.float32)).permute(2, 0, 1) / 255 * 2 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """Return the picture of pixels [3, H, W] in -1..1; what lies beyond is clipped."""
    in_01 = (pixels.to("cpu", torch.float32) / 2 + 0.5).clamp(0, 1)
    # Rounded to the nearest as diffusers does, not cut off.
    return Image.fromarray((in_01 * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
