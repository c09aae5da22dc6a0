"""Draw the captioned pictures: python -m icons.make_data. The same seed gives the same bytes.

Writes an image folder, `train/` and `held_out/`, each with a metadata.jsonl (file_name, text, what was drawn where).
`kind` in a row is `single`, `pair`, or, held out only, `new pair`: two subjects that no training picture shows
together.
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
from icons.scenes import Scene, pair_scene, single_scene, split_pairs
from icons.vocabulary import SUBJECTS
from manylora.training.aside import directory_aside


@dataclass(frozen=True)
class DataSize:
    """How many pictures of each kind."""

    singles_a_name: int = 160
    pairs: int = 8000
    held_out_singles_a_name: int = 10
    held_out_pairs: int = 500
    held_out_new_pairs: int = 500


def scenes(
    size: DataSize, drawings: Mapping[str, Sequence[Drawing]], seed: int
) -> Iterator[tuple[str, str, Scene]]:
    """Yield (split, kind, scene) in a fixed order; every scene has its own generator."""
    seen_pairs, new_pairs = split_pairs(SUBJECTS, seed)
    for split, kind, count in (
        ("train", "single", size.singles_a_name * len(SUBJECTS)),
        ("train", "pair", size.pairs),
        ("held_out", "single", size.held_out_singles_a_name * len(SUBJECTS)),
        ("held_out", "pair", size.held_out_pairs),
        ("held_out", "new pair", size.held_out_new_pairs),
    ):
        for index in range(count):
            rng = random.Random(f"{seed}/{split}/{kind}/{index}")
            if kind == "single":
                yield split, kind, single_scene(rng, SUBJECTS[index % len(SUBJECTS)], drawings)
            else:
                pairs = new_pairs if kind == "new pair" else seen_pairs
                yield split, kind, pair_scene(rng, pairs[index % len(pairs)], drawings)


def write_image_folder(
    folder: Path, size: DataSize, drawings: Mapping[str, Sequence[Drawing]], seed: int
) -> None:
    """Write all pictures and their metadata; the folder appears whole or not at all."""
    from PIL import Image

    with directory_aside(folder) as aside:
        lines: dict[str, list[str]] = {"train": [], "held_out": []}
        for split, kind, scene in scenes(size, drawings, seed):
            file_name = f"{len(lines[split]) // 1000:03d}/{len(lines[split]):06d}.png"
            (aside / split / file_name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(to_pixels(scene)).save(aside / split / file_name)
            lines[split].append(
                json.dumps({"file_name": file_name, "kind": kind} | scene.as_record()) + "\n"
            )
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
        subject.name: [drawing for drawings in by_set for drawing in drawings.get(subject.name, [])]
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
