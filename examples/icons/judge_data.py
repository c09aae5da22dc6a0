"""What the judge learns from: drawn pictures, the names on them and the look that each has."""

# Shapes: N pictures, K names, S looks.

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from icons.icon_sets import BASE_SETS
from icons.image_folder import read_metadata, read_pixels
from icons.vocabulary import SUBJECTS

NAMES = tuple(subject.name for subject in SUBJECTS)
BASE_LOOK = "base"
"""The look of the base's four sets together, where styles are told from it."""


@dataclass(frozen=True)
class JudgeData:
    """Pictures with their labels."""

    pixels: NDArray[np.uint8]  # [N, 64, 64, 3]
    names: NDArray[np.int64]  # [N]  places in NAMES
    looks: NDArray[np.int64]  # [N]  places in look_names
    look_names: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of pictures and labels: what a judge's training depends on."""
        digest = hashlib.sha256(json.dumps(self.look_names).encode())
        for array in (self.pixels, self.names, self.looks):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def base_data(folder: Path, split: str) -> JudgeData:
    """Read a split of the base's pictures; the look is the icon set that drew a thing."""
    rows = read_metadata(folder / split)
    looks = [row["placed"]["drawing"].split(":")[0] for row in rows]
    return _labelled(folder / split, rows, looks, BASE_SETS)


def style_data(base: Path, styles: Path, split: str, style_names: Sequence[str]) -> JudgeData:
    """Read a split of every style's pictures and as many of the base's as of a style; the look is the style.

    So no look is rarer than another, and the judge has to tell a picture's look by what it is.
    """
    look_names = (BASE_LOOK, *style_names)
    parts = [_of_one_look(styles / name / split, name, look_names) for name in style_names]
    most = max(len(part.pixels) for part in parts)
    parts.append(_of_one_look(base / split, BASE_LOOK, look_names, most))
    return JudgeData(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.names for part in parts]),
        np.concatenate([part.looks for part in parts]),
        look_names,
    )


def _of_one_look(folder: Path, look: str, look_names: Sequence[str], most: int | None = None) -> JudgeData:
    rows = read_metadata(folder)
    if most is not None:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
    return _labelled(folder, rows, [look] * len(rows), look_names)


def _labelled(folder: Path, rows: list[dict], looks: Sequence[str], look_names: Sequence[str]) -> JudgeData:
    return JudgeData(
        read_pixels(folder, rows),
        np.array([NAMES.index(row["subjects"][0]) for row in rows]),
        np.array([look_names.index(look) for look in looks]),
        tuple(look_names),
    )


def batches(data: JudgeData, size: int) -> Iterator[slice]:
    """Yield slices that cover the pictures in their order."""
    yield from (slice(start, start + size) for start in range(0, len(data.pixels), size))
