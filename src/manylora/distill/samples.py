"""Pictures of a look as one PNG: a caption a row, a way of sampling a column."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor


def save_samples(
    columns: Mapping[str, Tensor],  # each [N, 3, H, W] in [-1, 1]
    captions: Sequence[str],
    path: Path,
) -> None:
    """Write a grid; what its columns and rows are stands in the PNG's text fields."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    columns_HW3 = [
        np.concatenate(_bytes(images), axis=0) for images in columns.values()
    ]  # each N pictures below each other
    told = PngInfo()
    told.add_text("columns", json.dumps(list(columns)))
    told.add_text("rows", json.dumps(list(captions)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(columns_HW3, axis=1)).save(path, pnginfo=told)


def _bytes(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[N, H, W, 3] in 0..255 from [N, 3, H, W] in [-1, 1], clipped."""
    bounded = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = (
        bounded.permute(0, 2, 3, 1).byte().cpu().numpy()
    )
    return array
