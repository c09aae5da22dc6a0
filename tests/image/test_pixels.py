"""From pictures to a VAE's pixels and back."""

import numpy as np
import pytest
import torch
from PIL import Image

from manylora.image.pixels import to_image, to_pixels


def test_there_and_back_is_the_same_picture() -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    pixels = to_pixels(Image.fromarray(values), 12, 8)
    assert pixels.shape == (3, 8, 12)
    assert float(pixels.min()) >= -1
    assert float(pixels.max()) <= 1
    assert np.array_equal(np.asarray(to_image(pixels)), values)


def test_what_overshoots_is_clipped() -> None:
    image = to_image(torch.tensor([-3.0, 0.0, 3.0]).reshape(3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_is_taken(mode: str) -> None:
    pixels = to_pixels(Image.new(mode, (4, 4)), 8, 6)
    assert pixels.shape == (3, 6, 8)
    assert bool(torch.isfinite(pixels).all())


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert bool((to_pixels(image, 4, 4) == 1).all())
    image.putalpha(255)
    assert to_pixels(image, 4, 4)[:, 0, 0].tolist() == [1, -1, -1]


def test_sixteen_bits_are_scaled() -> None:
    values = np.array([[0, 65535 // 2, 65535]], dtype=np.uint16)
    assert np.asarray(to_image(to_pixels(Image.fromarray(values), 3, 1)))[0, :, 0].tolist() == [0, 127, 255]
