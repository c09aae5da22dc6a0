"""Draw the captioned pictures: python -m icons.make_data. The same seed gives the same bytes.

Writes an image folder, `train/` and `held_out/`, each with a metadata.jsonl (file_name, text, what was drawn where).
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from icons.draw import to_pixels
from icons.folders import DATA_FOLDER, SETS_FOLDER
from icons.icon_sets import BASE_SETS, PACKAGES, Drawing, read_drawings
from icons.scenes import Scene, make_scene
from icons.vocabulary import SUBJECTS
from manylora.training.aside import directory_aside


@dataclass(frozen=True)
class DataSize:
    """How many pictures of each name."""

    train: int = 100
    held_out: int = 10


def scenes(
    size: DataSize, drawings: Mapping[str, Sequence[Drawing]], seed: int
) -> Iterator[tuple[str, Scene]]:
    """Yield (split, scene) in a fixed order; every scene has its own generator."""
    for split, count in (("train", size.train), ("held_out", size.held_out)):
        for index in range(count * len(SUBJECTS)):
            rng = random.Random(f"{seed}/{split}/{index}")
            yield split, make_scene(rng, SUBJECTS[index % len(SUBJECTS)], drawings)


def write_image_folder(
    folder: Path, size: DataSize, drawings: Mapping[str, Sequence[Drawing]], seed: int
) -> None:
    """Write all pictures and their metadata; the folder appears whole or not at all."""
    from PIL import Image

    with directory_aside(folder) as aside:
        lines: dict[str, list[str]] = {"train": [], "held_out": []}
        for split, scene in scenes(size, drawings, seed):
            file_name = f"{len(lines[split]) // 1000:03d}/{len(lines[split]):06d}.png"
            (aside / split / file_name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(to_pixels(scene)).save(aside / split / file_name)
            lines[split].append(json.dumps({"file_name": file_name} | scene.as_record()) + "\n")
        for split, rows in lines.items():
            (aside / split / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
        about = {
            "seed": seed,
            "size": asdict(size),
            "sets": {name: asdict(PACKAGES[name]) for name in BASE_SETS},
        }
        (aside / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def base_drawings(folder: Path = SETS_FOLDER) -> dict[str, list[Drawing]]:
    """Return every drawing of the base's sets by the name of its subject."""
    by_set = [read_drawings(set_name, folder) for set_name in BASE_SETS]
    return {
        subject.name: [drawings[subject.name] for drawings in by_set if subject.name in drawings]
        for subject in SUBJECTS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.is_dir():
        print(f"{options.out} is there already")
        return
    write_image_folder(options.out, DataSize(), base_drawings(), options.seed)
    print(f"{options.out}: written")


if __name__ == "__main__":
    main()
