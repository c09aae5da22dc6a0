"""The categories whose LoRAs are mixed: which pictures of a style they take, and that run.sh names them all."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from manylora.errors import DataError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def _examples_on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def part(name):
    return importlib.import_module(name)


def drawn(folder: Path, names: list[str]) -> None:
    for split in ("train", "held_out"):
        (folder / split).mkdir(parents=True)
        rows = []
        for number, name in enumerate(names):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / split / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "text": f"a {name}", "subjects": [name]})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_categories_are_disjoint_and_of_known_styles():
    categories = part("mixtures.categories").CATEGORIES.values()
    names = {subject.name for subject in part("icons.vocabulary").SUBJECTS}
    taken = [name for category in categories for name in category.names]
    assert len(taken) == len(set(taken)) > 80
    assert set(taken) <= names
    assert {category.style for category in categories} <= part("styles.recipes").STYLES.keys()


def test_a_category_takes_its_names_alone(tmp_path):
    drawn(tmp_path / "styles" / "pixel-art", ["cat", "car", "sheep", "apple"])
    folder = part("mixtures.categories").write_category("animals", tmp_path / "styles", tmp_path / "out")
    rows = [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()]
    assert [row["subjects"] for row in rows] == [["cat"], ["sheep"]]
    for row in rows:
        copied, source = (
            (place / "train" / row["file_name"]).read_bytes()
            for place in (folder, tmp_path / "styles" / "pixel-art")
        )
        assert copied == source
    assert sorted(path.name for path in (folder / "held_out").glob("*.png")) == ["0.png", "2.png"]


def test_a_style_that_is_not_drawn_is_said(tmp_path):
    with pytest.raises(DataError, match=r"styles\.make_data pixel-art"):
        part("mixtures.categories").write_category("animals", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "animals").exists()


def test_run_trains_and_mixes_every_category():
    script = (EXAMPLES / "mixtures" / "run.sh").read_text()
    listed = re.search(r"categories=\((.*)\)", script)
    assert listed is not None
    assert listed[1].split() == list(part("mixtures.categories").CATEGORIES)
    refused = subprocess.run(
        ["bash", str(EXAMPLES / "mixtures" / "run.sh"), "nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "known: loras judge sets repair report" in refused.stderr
