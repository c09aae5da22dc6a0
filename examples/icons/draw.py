"""A scene as SVG, and the SVG as pixels."""

import io

import numpy as np
from numpy.typing import NDArray

from icons.scenes import SIZE, Placement, Scene


def to_svg(scene: Scene) -> str:
    """Return the SVG document of a scene."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {SIZE} {SIZE}">'
        f'<rect width="{SIZE}" height="{SIZE}" fill="{scene.background}"/>{_placed(scene.placement)}</svg>'
    )


def to_pixels(scene: Scene) -> NDArray[np.uint8]:
    """Render a scene. Returns [SIZE, SIZE, 3], RGB."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=to_svg(scene), skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB"))


def _placed(placement: Placement) -> str:
    drawing = placement.drawing
    scale = placement.side / max(drawing.width, drawing.height)
    mirror = -scale if placement.mirrored else scale
    x, y = placement.centre
    return (
        f'<g transform="translate({x:.3f} {y:.3f}) scale({mirror:.6f} {scale:.6f}) '
        f'translate({-drawing.width / 2} {-drawing.height / 2})">{drawing.body}</g>'
    )
