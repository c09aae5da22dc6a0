"""What a picture shows, as numbers: captions, pairs, places. Knows no SVG and no pixels.

The caption names the subjects and nothing else: which drawing, where, how large, mirrored or not, which hue and which
background are left open, so that a caption stands for many pictures and a few sampling steps cannot recall one.
"""

import colorsys
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from icons.icon_sets import Drawing
from icons.vocabulary import Subject

SIZE = 64
"""Pixels of a picture's side."""

HELD_OUT_PAIR_SHARE = 0.1
"""Share of all pairs of subjects of which no scene is trained on."""


@dataclass(frozen=True)
class Placement:
    """One drawing on the picture."""

    drawing: Drawing
    centre: tuple[float, float]
    """In pixels."""
    side: float
    """Of the drawing's longer side, in pixels."""
    degrees: float
    mirrored: bool
    hue_degrees: float
    """Rotation of all its colours."""


@dataclass(frozen=True)
class Scene:
    """One captioned picture before it is drawn."""

    caption: str
    subjects: tuple[str, ...]
    background: str
    """As #rrggbb."""
    placements: tuple[Placement, ...]

    def as_record(self) -> dict[str, Any]:
        """Return what metadata.jsonl says of it, the drawings by set and icon instead of their SVG."""
        placed = [
            asdict(p) | {"drawing": f"{p.drawing.set_name}:{p.drawing.icon}"} for p in self.placements
        ]
        return {
            "text": self.caption,
            "subjects": list(self.subjects),
            "background": self.background,
            "placed": placed,
        }


def caption_of(subjects: Sequence[Subject]) -> str:
    """Return "a cat" or "a cat and a pizza"."""
    return " and ".join(subject.with_article for subject in subjects)


def split_pairs(
    subjects: Sequence[Subject], seed: int
) -> tuple[list[tuple[Subject, Subject]], list[tuple[Subject, Subject]]]:
    """Return (pairs to train on, pairs never trained on); each unordered pair stands in one of them, once."""
    pairs = list(combinations(subjects, 2))
    random.Random(f"pairs/{seed}").shuffle(pairs)
    num_held_out = round(len(pairs) * HELD_OUT_PAIR_SHARE)
    return pairs[num_held_out:], pairs[:num_held_out]


def single_scene(rng: random.Random, subject: Subject, drawings: Mapping[str, Sequence[Drawing]]) -> Scene:
    """Draw a scene of one subject, large and near the middle."""
    side = SIZE * rng.uniform(0.7, 1.0)
    reach = (SIZE - side) / 2 + 2
    centre = (SIZE / 2 + rng.uniform(-reach, reach), SIZE / 2 + rng.uniform(-reach, reach))
    placed = _place(rng, rng.choice(drawings[subject.name]), centre, side)
    return Scene(caption_of([subject]), (subject.name,), _pastel(rng), (placed,))


def pair_scene(
    rng: random.Random, pair: tuple[Subject, Subject], drawings: Mapping[str, Sequence[Drawing]]
) -> Scene:
    """Draw a scene of two subjects on opposite sides of the middle; the caption's order says nothing of the places."""
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    angle = rng.uniform(0, 2 * math.pi)
    # Two discs of radius 15 px side by side reach the edges; on a diagonal there is more room.
    reach = 15.5 + 4 * abs(math.sin(2 * angle))
    placements = []
    for subject, sign in ((first, 1), (second, -1)):
        centre = (
            SIZE / 2 + sign * reach * math.cos(angle) + rng.uniform(-1, 1),
            SIZE / 2 + sign * reach * math.sin(angle) + rng.uniform(-1, 1),
        )
        side = SIZE * rng.uniform(0.46, 0.56)
        placements.append(_place(rng, rng.choice(drawings[subject.name]), centre, side))
    return Scene(caption_of([first, second]), (first.name, second.name), _pastel(rng), tuple(placements))


def _place(rng: random.Random, drawing: Drawing, centre: tuple[float, float], side: float) -> Placement:
    return Placement(drawing, centre, side, rng.uniform(-8, 8), rng.random() < 0.5, rng.uniform(-20, 20))


def _pastel(rng: random.Random) -> str:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.35), rng.uniform(0.85, 1.0))
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
