"""The table `weights`: how pictures change with a style's weight and the LCM-LoRA's, as rows and as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from manylora.bench.image.rows import MANY_STEPS, STYLE_WEIGHT, ImageRow, fast_row
from manylora.bench.image.table import RowFigures, Table
from manylora.image.grid import labelled_grid

STEPS = 4


def weights_table(
    guidance: float,
    lcm: str,
    styles: Sequence[str],
    style_weights: Sequence[float],
    lcm_weights: Sequence[float],
) -> list[ImageRow]:
    """Return the rows: each style alone at many steps, then all pairs of weights at four."""
    rows = []
    for style in styles:
        rows.append(
            ImageRow(
                label=f"{style} alone, {MANY_STEPS} steps, guidance {guidance:g}",
                steps=MANY_STEPS,
                guidance=guidance,
                lora=f"{style}:{STYLE_WEIGHT}",
                look=style,
            )
        )
        rows += [
            fast_row(
                f"{style} {weight:g} + {lcm} {lcm_weight:g}",
                "lcm",
                STEPS,
                mixture_of(style, weight, lcm, lcm_weight),
                style,
            )
            for weight in style_weights
            for lcm_weight in lcm_weights
        ]
    return rows


def mixture_of(style: str, weight: float, lcm: str, lcm_weight: float) -> str:
    return f"{style}:{weight:g}+{lcm}:{lcm_weight:g}"


def weights_markdown(
    figures: Sequence[RowFigures],
    lcm: str,
    style: str,
    style_weights: Sequence[float],
    lcm_weights: Sequence[float],
) -> str:
    """Return a style's map as a table: of each pair of weights how much style and prompt are kept, and KID."""
    by_mixture = {row.row.lora: row for row in figures}
    heads = [f"{style} \\ {lcm}", *(f"{weight:g}" for weight in lcm_weights)]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * len(lcm_weights) + "|"]
    for weight in style_weights:
        cells = [
            _cell(by_mixture[mixture_of(style, weight, lcm, lcm_weight)]) for lcm_weight in lcm_weights
        ]
        lines.append("| " + " | ".join([f"{weight:g}", *cells]) + " |")
    told = "Style kept, prompt accuracy (both by the style judge), KID x 1000:"
    return told + "\n\n" + "\n".join(lines) + "\n"


def weights_picture(
    table: Table,
    rows: Sequence[ImageRow],
    lcm: str,
    style: str,
    style_weights: Sequence[float],
    lcm_weights: Sequence[float],
    picture: int = 0,
) -> Image.Image:
    """Return one labelled picture of a style's map: the same prompt and seed at every pair of weights.

    Args:
        picture: which of the table's prompts.
    """
    by_mixture = {row.lora: row for row in rows}
    cells = [
        [
            _image(table.picture(by_mixture[mixture_of(style, weight, lcm, lcm_weight)], picture))
            for lcm_weight in lcm_weights
        ]
        for weight in style_weights
    ]
    return labelled_grid(
        cells,
        [f"{lcm} {weight:g}" for weight in lcm_weights],
        [f"{style} {weight:g}" for weight in style_weights],
        f"{table.prompts.captions[picture]}, {STEPS} steps",
    )


def _cell(figures: RowFigures) -> str:
    look, prompt = figures.look_share, figures.style_accuracy
    assert look is not None
    assert prompt is not None
    return f"{look.value:.0%}, {prompt.value:.0%}, {1000 * figures.kid.value:.0f}"


def _image(pixels: Tensor) -> Image.Image:  # [3, H, W] in [-1, 1]
    levels = pixels.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(levels.cpu().numpy()))
