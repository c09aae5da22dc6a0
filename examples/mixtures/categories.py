"""Choose the pictures of a category in one style: python -m mixtures.categories NAME...

A LoRA of a category learns one style from some of the names only, so it is near in weights to the LoRA of the whole
style. Pictures are copied from the style's, whose data must be there (python -m styles.make_data STYLE).
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from icons.folders import DATA_FOLDER
from icons.vocabulary import SUBJECTS
from styles.folders import STYLES_FOLDER

from manylora.errors import DataError
from manylora.training.aside import directory_aside

CATEGORIES_FOLDER = DATA_FOLDER.parent / "categories"


@dataclass(frozen=True)
class Category:
    """A run of the vocabulary, which is in groups, in one style."""

    first: str
    last: str
    style: str

    @property
    def names(self) -> frozenset[str]:
        all_names = [subject.name for subject in SUBJECTS]
        return frozenset(all_names[all_names.index(self.first) : all_names.index(self.last) + 1])


CATEGORIES: Mapping[str, Category] = {
    "animals": Category("cat", "sheep", "pixel-art"),
    "food": Category("apple", "coffee", "neon"),
    "vehicles": Category("car", "sailboat", "stained-glass"),
    "nature": Category("sun", "sunflower", "fluent-emoji"),
    "things": Category("anchor", "skull", "paper-cut"),
}


def write_category(name: str, styles: Path = STYLES_FOLDER, folder: Path = CATEGORIES_FOLDER) -> Path:
    """Copy a category's pictures of both splits to `folder/name`; the folder appears whole or not at all.

    Raises:
        DataError: the style has not been drawn.
    """
    category = CATEGORIES[name]
    with directory_aside(folder / name) as aside:
        for split in ("train", "held_out"):
            _copy(styles / category.style / split, aside / split, category)
    return folder / name


def _copy(source: Path, target: Path, category: Category) -> None:
    listed = source / "metadata.jsonl"
    if not listed.is_file():
        raise DataError(f"no {listed}: draw it with python -m styles.make_data {category.style}")
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if set(row["subjects"]) <= category.names]
    target.mkdir(parents=True)
    for row in kept:
        (target / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / row["file_name"], target / row["file_name"])
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    (target / "metadata.jsonl").write_text(lines, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=sorted(CATEGORIES), metavar="NAME")
    for name in parser.parse_args(arguments).names:
        print(write_category(name))


if __name__ == "__main__":
    main()
