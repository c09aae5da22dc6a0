"""Several pictures in one, labelled by what differs along its rows and columns. Knows no engine."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_MIN_CELL = 96
"""Pixels below which a cell is drawn larger, by a whole factor, so that labels have room."""


def labelled_grid(
    cells: Sequence[Sequence[Image.Image | None]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Return one picture of all: cells[row][column], all of one size; None is drawn as an empty frame.

    Small cells are enlarged without smoothing, so that what is seen is what was made.
    """
    shown = [image for row in cells for image in row if image is not None]
    width, height = shown[0].size if shown else (_MIN_CELL, _MIN_CELL)
    factor = -(-_MIN_CELL // min(width, height))
    width, height = width * factor, height * factor
    font = ImageFont.load_default(size=max(12, height // 12))
    line = _text_size("Ag", font)[1] + _MARGIN
    left = max((_text_size(label, font)[0] for label in row_labels), default=0) + 2 * _MARGIN
    top = _MARGIN + line * (2 if title else 1)
    # A column is as wide as its label, if that is wider than a cell.
    pitch = max([width, *(_text_size(label, font)[0] for label in column_labels)]) + _MARGIN
    size = (
        max(left + pitch * len(column_labels), _text_size(title, font)[0] + 2 * _MARGIN),
        top + (height + _MARGIN) * len(row_labels),
    )
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    draw.text((_MARGIN, _MARGIN), title, fill="black", font=font)
    for column, label in enumerate(column_labels):
        draw.text((left + column * pitch + width / 2, top - line), label, "black", font, anchor="ma")
    for row, label in enumerate(row_labels):
        y = top + row * (height + _MARGIN)
        draw.text((left - _MARGIN, y + height / 2), label, "black", font, anchor="rm")
        for column, image in enumerate(cells[row]):
            at = (left + column * pitch, y)
            if image is None:
                draw.rectangle((*at, at[0] + width - 1, at[1] + height - 1), outline="red")
                draw.text((at[0] + width / 2, y + height / 2), "failed", "red", font, anchor="mm")
            else:
                grid.paste(image.resize((width, height), Image.Resampling.NEAREST), at)
    return grid


def _text_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text)
    return int(right - left), int(bottom - top)
