"""What a picture shows, as numbers: caption, drawing, place. Knows no SVG and no pixels.

The caption names the subject and nothing else: which drawing, where, how large, mirrored or not and on which background
are left open, so that a caption stands for many pictures and a few sampling steps cannot recall one.
"""

import colorsys
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from icons.icon_sets import Drawing
from icons.vocabulary import Subject

SIZE = 64
"""Pixels of a picture's side."""


@dataclass(frozen=True)
class Placement:
    """One drawing on the picture."""

    drawing: Drawing
    centre: tuple[float, float]
    """In pixels."""
    side: float
    """Of the drawing's longer side, in pixels."""
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    """One captioned picture before it is drawn."""

    subject: str
    caption: str
    background: str
    """As #rrggbb, or `none`."""
    placement: Placement

    def as_record(self) -> dict[str, Any]:
        """Return what metadata.jsonl says of it, the drawing by set and icon instead of its SVG."""
        drawing = self.placement.drawing
        placed = asdict(self.placement) | {"drawing": f"{drawing.set_name}:{drawing.icon}"}
        return {
            "text": self.caption,
            "subjects": [self.subject],
            "background": self.background,
            "placed": placed,
        }


def make_scene(rng: random.Random, subject: Subject, drawings: Mapping[str, Sequence[Drawing]]) -> Scene:
    """Draw a scene of one subject, large and near the middle."""
    side = SIZE * rng.uniform(0.84, 0.96)
    centre = (SIZE / 2 + rng.uniform(-1, 1), SIZE / 2 + rng.uniform(-1, 1))
    placement = Placement(rng.choice(drawings[subject.name]), centre, side, rng.random() < 0.5)
    return Scene(subject.name, subject.with_article, _pastel(rng), placement)


def _pastel(rng: random.Random) -> str:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.35), rng.uniform(0.85, 1.0))
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
