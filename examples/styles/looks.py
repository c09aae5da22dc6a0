"""Looks that no icon set has: what a picture of flat colours becomes in cut paper, pixels, ink, neon or glass.

Each look takes one drawing, large and with transparency, and a generator for what it leaves to chance (paper, ink,
background). The same generator gives the same bytes. Knows no caption, scene or file.
"""

# Shapes: S pixels of the drawing's side, SCALE times those of the picture; channels last, values in [0, 1].

import colorsys
import random
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Array = NDArray[np.float32]
Look = Callable[[Array, random.Random], Array]
"""(RGBA [S, S, 4], generator) -> RGB [S, S, 3]."""

SCALE = 4
"""Looks work at this many times the picture's side, so that lines and edges are smooth when it is scaled down."""


def paper_cut(drawing: Array, rng: random.Random) -> Array:
    """Sheets of coloured paper on each other, the largest below, each with its shadow."""
    colours, sheet_of = _flat_colours(drawing, 5)
    areas = [(sheet_of == index).sum() for index in range(len(colours))]
    order = sorted((index for index, area in enumerate(areas) if area), key=lambda index: -areas[index])
    picture = np.ones((*sheet_of.shape, 3), np.float32) * _hsv(rng.random(), 0.28, 0.80)
    for place, index in enumerate(order):
        # A sheet reaches under those above it: the stack has no gaps.
        sheet = _wide(np.isin(sheet_of, order[place:]), 3)
        shadow = _blurred(_moved(sheet, 5, 7), 4.0)[..., None]
        picture *= 1.0 - 0.55 * shadow
        sheet = _blurred(sheet, 0.7)[..., None]
        picture = picture * (1 - sheet) + sheet * (0.86 * colours[index] + 0.12)
    return picture * _grain(picture.shape[0], rng, 0.05)


def pixel_art(drawing: Array, rng: random.Random) -> Array:
    """A grid of large pixels in few colours, the shape outlined in near black, on one flat colour."""
    cell = 2 * SCALE
    small = _shrunk(drawing, cell)
    inside = small[..., 3] > 0.45
    levels = np.round(np.clip((small[..., :3] - 0.5) * 1.25 + 0.5, 0, 1) * 3) / 3
    outline = _wide(inside, 1, square=False) & ~inside
    picture = np.ones((*inside.shape, 3), np.float32) * _hsv(rng.choice(_RETRO_HUES), 0.45, 0.62)
    picture[inside] = levels[inside]
    picture[outline] = (0.08, 0.07, 0.12)
    return picture.repeat(cell, axis=0).repeat(cell, axis=1)


def line_drawing(drawing: Array, rng: random.Random) -> Array:
    """Lines of one ink on paper, nothing filled."""
    line = _blurred(_wide(_edges(drawing), 2), 0.8)[..., None]
    paper = np.asarray(rng.choice(_PAPERS), np.float32)
    ink = np.asarray(rng.choice(_INKS), np.float32)
    return (paper * (1 - line) + ink * line) * _grain(line.shape[0], rng, 0.02)


def neon(drawing: Array, rng: random.Random) -> Array:
    """Glowing tubes along the edges, in the drawing's own hues, in the dark."""
    line = _wide(_edges(drawing), 2)
    hues = _vivid(_filled(drawing))
    tube = _blurred(line, 1.0)[..., None]
    glow = sum(weight * _blurred(line, radius) for weight, radius in ((0.9, 5.0), (1.3, 16.0)))
    picture = np.ones((*line.shape, 3), np.float32) * _hsv(rng.uniform(0.6, 0.8), 0.6, 0.11)
    picture = picture + np.asarray(glow)[..., None] * hues
    # The middle of a tube is nearly white.
    return picture * (1 - tube) + tube * (0.45 * hues + 0.55)


def stained_glass(drawing: Array, rng: random.Random) -> Array:
    """Panes of vivid glass held by lead, the background cut into panes too."""
    colours, pane_of = _flat_colours(drawing, 5)
    size = pane_of.shape[0]
    panes, cuts = _background_panes(size, rng)
    picture = panes.copy()
    for index, colour in enumerate(colours):
        picture[pane_of == index] = _vivid(colour[None, None])[0, 0] * 0.92
    borders = _changes(pane_of) | (cuts & (pane_of < 0))
    lead = _blurred(_wide(borders, 4), 0.8)[..., None]
    # Glass is brighter towards one corner: light falls through it.
    ramp = np.linspace(1.12, 0.82, size, dtype=np.float32)
    lit = picture * (0.5 * (ramp[:, None] + ramp[None, :]))[..., None]
    return lit * (1 - lead) + lead * np.float32(0.07)


LOOKS: Mapping[str, Look] = {
    "paper-cut": paper_cut,
    "pixel-art": pixel_art,
    "line-drawing": line_drawing,
    "neon": neon,
    "stained-glass": stained_glass,
}

_RETRO_HUES = (0.0, 0.08, 0.14, 0.33, 0.5, 0.58, 0.68, 0.83)
_PAPERS = ((0.99, 0.98, 0.94), (0.97, 0.95, 0.90), (1.0, 1.0, 1.0))
_INKS = ((0.10, 0.10, 0.12), (0.12, 0.15, 0.35), (0.25, 0.14, 0.08))


def in_look(drawing: NDArray[np.uint8], look: Look, rng: random.Random) -> NDArray[np.uint8]:
    """Return the picture [S / SCALE, S / SCALE, 3] of a drawing [S, S, 4], both 0..255."""
    drawn = _shrunk(look(drawing.astype(np.float32) / 255, rng), SCALE)
    return np.clip(np.round(drawn * 255), 0, 255).astype(np.uint8)


def _flat_colours(drawing: Array, count: int) -> tuple[Array, NDArray[np.int64]]:
    """Return (colours [count, 3], which of them each pixel has [S, S]; -1 outside the drawing)."""
    inside = drawing[..., 3] > 0.5
    flat = Image.fromarray((_filled(drawing) * 255).astype(np.uint8)).quantize(
        count, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    )
    palette = np.asarray(flat.getpalette()[: 3 * count], np.float32).reshape(-1, 3) / 255
    # The commonest colour round a pixel: slivers along soft edges, and details smaller than a cut, go.
    smooth = np.asarray(Image.fromarray(np.asarray(flat)).filter(ImageFilter.ModeFilter(7)), np.int64)
    return palette, np.where(inside, smooth, -1)


def _filled(drawing: Array) -> Array:
    """RGB of the drawing; outside it, the colours nearby, so that its outline is no edge of colour."""
    known = drawing[..., 3] > 0.5
    filled = drawing[..., :3] * known[..., None]
    for radius in (3.0, 12.0, 48.0):
        reach = _blurred(known, radius)
        spread = np.stack([_blurred(filled[..., channel], radius) for channel in range(3)], axis=-1)
        reached = ~known & (reach > 0.02)
        filled[reached] = (spread / np.maximum(reach, 0.02)[..., None])[reached]
        known = known | reached
    return np.clip(filled, 0, 1).astype(np.float32)


def _edges(drawing: Array) -> NDArray[np.bool_]:
    """Where transparency changes quickly, or inside the drawing its colour [S, S]."""
    inside, colours = drawing[..., 3] > 0.5, _filled(drawing)
    steps = _steps(drawing[..., 3])
    for channel in range(3):
        steps = np.maximum(steps, _steps(colours[..., channel]) * inside)
    return steps > 0.045


def _steps(values: Array) -> Array:
    """Length of the gradient of [S, S], smoothed."""
    down, right = np.gradient(_blurred(values, 1.5))
    return np.hypot(down, right).astype(np.float32)


def _changes(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where a label differs from that below or to the right."""
    changes = np.zeros(labels.shape, bool)
    changes[:-1] |= labels[:-1] != labels[1:]
    changes[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return changes


def _background_panes(size: int, rng: random.Random) -> tuple[Array, NDArray[np.bool_]]:
    """Pale panes between straight cuts across the picture, and the cuts."""
    y, x = np.mgrid[0:size, 0:size] / size
    sides = np.zeros((size, size), np.int64)
    for bit in range(4):
        angle, offset = np.pi * (bit + rng.random()) / 4, rng.uniform(-0.3, 0.3)
        side = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) > offset
        sides += side.astype(np.int64) << bit
    hue = rng.random()
    shades = np.asarray(
        [_hsv(hue + rng.uniform(-0.06, 0.06), rng.uniform(0.25, 0.5), 0.9) for _ in range(16)]
    )
    return shades[sides].astype(np.float32), _changes(sides)


def _vivid(rgb: Array) -> Array:
    """The same hues, saturated and bright; greys stay grey."""
    low, high = rgb.min(axis=-1, keepdims=True), rgb.max(axis=-1, keepdims=True)
    stretched = (rgb - 0.8 * low) / np.maximum(high - 0.8 * low, 1e-3)
    coloured = np.clip((high - low) * 4, 0, 1)
    return (coloured * stretched + (1 - coloured) * np.maximum(rgb, 0.55)).astype(np.float32)


def _wide(mask: NDArray[np.bool_], radius: int, square: bool = True) -> NDArray[np.bool_]:
    """The mask grown by so many pixels: as a square, or only along the axes."""
    if square:
        grown = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * radius + 1))
        return np.asarray(grown) > 0
    grown_by_axis = mask.copy()
    for axis in (0, 1):
        for step in (-radius, radius):
            moved = np.roll(mask, step, axis)
            # What was rolled in from the other end is none of its neighbours.
            edge = [slice(None), slice(None)]
            edge[axis] = slice(None, step) if step > 0 else slice(step, None)
            moved[tuple(edge)] = False
            grown_by_axis |= moved
    return grown_by_axis


def _blurred(values: NDArray[np.generic], radius: float) -> Array:
    """Gaussian blur of [S, S] in [0, 1]; the rim is continued outwards."""
    image = Image.fromarray(np.asarray(values, np.float32) * 255).convert("L")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _moved(mask: NDArray[np.bool_], right: int, down: int) -> NDArray[np.bool_]:
    moved = np.zeros_like(mask)
    moved[down:, right:] = mask[:-down, :-right]
    return moved


def _shrunk(picture: Array, factor: int) -> Array:
    """Mean over squares; colours of [.., 4] count by how opaque they are."""
    height, width, channels = picture.shape
    squares = picture.reshape(height // factor, factor, width // factor, factor, channels)
    if channels == 3:
        return squares.mean(axis=(1, 3))
    alpha = squares[..., 3:]
    colour = (squares[..., :3] * alpha).sum(axis=(1, 3)) / np.maximum(alpha.sum(axis=(1, 3)), 1e-3)
    return np.concatenate([colour, alpha.mean(axis=(1, 3))], axis=-1).astype(np.float32)


def _grain(size: int, rng: random.Random, strength: float) -> Array:
    """Fibres of paper [S, S, 1], round 1."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, strength, (size // 2, size // 2, 1))
    return 1 + noise.repeat(2, axis=0).repeat(2, axis=1).astype(np.float32)


def _hsv(hue: float, saturation: float, value: float) -> Array:
    return np.asarray(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)
