"""Read an image folder: metadata.jsonl and pixels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icons.scenes import SIZE


def read_metadata(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metadata.jsonl."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_pixels(folder: Path, rows: Sequence[dict[str, Any]]) -> NDArray[np.uint8]:
    """Return all pictures of the rows, [N, SIZE, SIZE, 3]."""
    from PIL import Image

    pixels = np.empty((len(rows), SIZE, SIZE, 3), dtype=np.uint8)
    for index, row in enumerate(rows):
        with Image.open(folder / row["file_name"]) as image:
            pixels[index] = np.asarray(image.convert("RGB"))
    return pixels


def to_unit_range(pixels: NDArray[np.uint8]) -> Tensor:
    """Return [B, 3, H, W] in [-1, 1] from [B, H, W, 3] in 0..255."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """Return [B, H, W, 3] in 0..255 from [B, 3, H, W] in [-1, 1]."""
    bounded = images.detach().clamp(-1, 1).add(1).mul(127.5).round()
    return bounded.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def save_grid(pixels: NDArray[np.uint8], columns: int, path: Path, zoom: int = 2) -> None:
    """Write pictures [N, H, W, 3] as one PNG, row by row."""
    from PIL import Image

    rows = [pixels[start : start + columns] for start in range(0, len(pixels), columns)]
    blank = np.full_like(pixels[0], 255)
    filled = [np.concatenate([*row, *[blank] * (columns - len(row))], axis=1) for row in rows]
    grid = Image.fromarray(np.concatenate(filled, axis=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST).save(path)
