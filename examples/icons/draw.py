"""A scene as SVG, and the SVG as pixels."""

import io

import numpy as np
from numpy.typing import NDArray

from icons.scenes import SIZE, Placement, Scene


def to_svg(scene: Scene) -> str:
    """Return the SVG document of a scene."""
    shapes = "".join(_placed(index, placement) for index, placement in enumerate(scene.placements))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {SIZE} {SIZE}">'
        f'<rect width="{SIZE}" height="{SIZE}" fill="{scene.background}"/>{shapes}</svg>'
    )


def to_pixels(scene: Scene) -> NDArray[np.uint8]:
    """Render a scene. Returns [SIZE, SIZE, 3], RGB."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=to_svg(scene), skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB"))


def _placed(index: int, placement: Placement) -> str:
    drawing = placement.drawing
    scale = placement.side / max(drawing.width, drawing.height)
    mirror = -scale if placement.mirrored else scale
    x, y = placement.centre
    # The filter hangs on the outermost group, in pixels, so that neither scale nor mirroring reaches its region.
    return (
        f'<filter id="hue{index}" filterUnits="userSpaceOnUse" x="0" y="0" width="{SIZE}" height="{SIZE}" '
        'color-interpolation-filters="sRGB">'
        f'<feColorMatrix type="hueRotate" values="{placement.hue_degrees:.3f}"/></filter>'
        f'<g filter="url(#hue{index})"><g transform="translate({x:.3f} {y:.3f}) rotate({placement.degrees:.3f}) '
        f'scale({mirror:.6f} {scale:.6f}) translate({-drawing.width / 2} {-drawing.height / 2})">'
        f"{drawing.body}</g></g>"
    )
