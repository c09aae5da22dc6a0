"""Draw the captioned pictures of styles: python -m styles.make_data STYLE... The same seed gives the same bytes.

Captions are those of the base, without a word for the style: whatever is new in the pictures has to go into the LoRA.
"""

import argparse
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from icons.draw import to_pixels, to_svg
from icons.folders import SETS_FOLDER
from icons.icon_sets import PACKAGES, Drawing, fetch, read_drawings
from icons.scenes import Scene, make_scene
from icons.vocabulary import SUBJECTS
from numpy.typing import NDArray
from PIL import Image

from manylora.training.aside import directory_aside
from styles.folders import STYLES_FOLDER
from styles.looks import LOOKS, SCALE, in_look
from styles.recipes import STYLES, Style


@dataclass(frozen=True)
class StyleSize:
    """How many pictures of each name in a style."""

    train: int = 16
    held_out: int = 2


def scenes(
    style_name: str, size: StyleSize, drawings: Mapping[str, Sequence[Drawing]], seed: int
) -> Iterator[tuple[str, Scene, random.Random]]:
    """Yield (split, scene, generator for the look) in a fixed order; every scene has its own generator."""
    subjects = [subject for subject in SUBJECTS if subject.name in drawings]
    for split, count in (("train", size.train), ("held_out", size.held_out)):
        for index in range(count * len(subjects)):
            rng = random.Random(f"{seed}/{style_name}/{split}/{index}")
            yield split, make_scene(rng, subjects[index % len(subjects)], drawings), rng


def draw(scene: Scene, style: Style, rng: random.Random) -> NDArray[np.uint8]:  # [64, 64, 3]
    """Draw a scene in a style."""
    if style.look is None:
        return to_pixels(scene)
    return in_look(_large_and_transparent(scene), LOOKS[style.look], rng)


def write_style(
    folder: Path,
    style_name: str,
    drawings: Mapping[str, Sequence[Drawing]],
    size: StyleSize = StyleSize(),
    seed: int = 0,
) -> None:
    """Write `train/` and `held_out/`, image folders with metadata.jsonl; the folder appears whole or not at all."""
    style = STYLES[style_name]
    with directory_aside(folder) as aside:
        lines: dict[str, list[str]] = {"train": [], "held_out": []}
        for split, scene, rng in scenes(style_name, size, drawings, seed):
            file_name = f"{len(lines[split]):05d}.png"
            (aside / split).mkdir(exist_ok=True)
            Image.fromarray(draw(scene, style, rng)).save(aside / split / file_name)
            lines[split].append(json.dumps({"file_name": file_name} | scene.as_record()) + "\n")
        for split, rows in lines.items():
            (aside / split / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
        about = {
            "style": style_name,
            "look": style.look,
            "seed": seed,
            "size": asdict(size),
            "sets": {name: asdict(PACKAGES[name]) for name in style.sets},
        }
        (aside / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def style_drawings(style: Style, folder: Path = SETS_FOLDER) -> dict[str, list[Drawing]]:
    """Fetch the style's sets and return their drawings by the name of the subject; what no set shows is absent."""
    for name in style.sets:
        fetch(name, folder)
    by_set = [read_drawings(name, folder) for name in style.sets]
    found = {
        subject.name: [drawings[subject.name] for drawings in by_set if subject.name in drawings]
        for subject in SUBJECTS
    }
    return {name: drawings for name, drawings in found.items() if drawings}


def _large_and_transparent(scene: Scene) -> NDArray[np.uint8]:
    """Render SCALE times as large, without background: [S, S, 4], RGBA."""
    import resvg_py

    svg = to_svg(replace(scene, background="none"))
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, zoom=SCALE)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGBA"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("styles", nargs="+", choices=list(STYLES))
    parser.add_argument("--out", type=Path, default=STYLES_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.styles:
        folder = options.out / name
        if folder.is_dir():
            print(f"{folder} is there already")
            continue
        drawings = style_drawings(STYLES[name])
        write_style(folder, name, drawings, seed=options.seed)
        print(f"{folder}: {len(drawings)} subjects, from {', '.join(STYLES[name].sets)}")


if __name__ == "__main__":
    main()
