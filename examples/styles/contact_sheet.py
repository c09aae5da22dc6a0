"""Look at styles: python -m styles.contact_sheet [STYLE...] writes one picture, a row for each style.

The same subjects in every row, so that a style is seen beside the others.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from icons.image_folder import save_grid
from icons.scenes import SIZE, make_scene
from icons.vocabulary import SUBJECTS

from styles.folders import STYLES_FOLDER
from styles.make_data import draw, style_drawings
from styles.recipes import STYLES

SHOWN = (
    *("cat", "dog", "owl", "fish", "apple", "pizza", "ice cream", "car"),
    *("rocket", "house", "tree", "umbrella", "guitar", "key", "heart", "robot"),
)


def contact_sheet(styles: Sequence[str], path: Path, seed: int = 0) -> None:
    """Draw the subjects in each style, a row for each."""
    by_name = {subject.name: subject for subject in SUBJECTS}
    pictures = []
    for style in styles:
        drawings = style_drawings(STYLES[style])
        for name in SHOWN:
            if name not in drawings:  # a set may lack a subject
                pictures.append(np.full((SIZE, SIZE, 3), 255, np.uint8))
                continue
            rng = random.Random(f"{seed}/{style}/{name}")
            pictures.append(draw(make_scene(rng, by_name[name], drawings), STYLES[style], rng))
    save_grid(np.stack(pictures), len(SHOWN), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("styles", nargs="*", default=[name for name in STYLES if STYLES[name].is_shipped])
    parser.add_argument("--out", type=Path, default=STYLES_FOLDER / "contact_sheet.png")
    options = parser.parse_args()
    contact_sheet(options.styles, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
