"""Bytes of a picture as pixels of one size. Knows no data set and no model."""

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def decode(data: bytes | None, size: int) -> Tensor:  # [3, size, size]
    """Return a picture in [-1, 1]: upright, on white, scaled by its shorter side, cropped round the middle.

    Raises:
        DataError: with the reason.
    """
    from PIL import Image, ImageOps

    if data is None:
        raise DataError("the file cannot be read")
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            fitted = ImageOps.fit(_on_white(upright), (size, size), Image.Resampling.LANCZOS)
    # PIL raises what its readers happen to raise; a picture must not stop a run of thousands.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(str(error)) from error
    return to_tensor(np.asarray(fitted))


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Return [3, H, W] in [-1, 1] from [H, W, 3] in 0..255."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Return [N, H, W, 3] in 0..255 from [N, 3, H, W] in [-1, 1], clipped."""
    bounded = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return bounded.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def _on_white(image: "Image") -> "Image":
    """RGB, what is transparent as white."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
