"""The styles' recipe: looks that differ from each other and keep shapes, captions without a style word, merging."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.convert import save_adapter
from manylora.models.diffusion_base import load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd

EXAMPLES = Path(__file__).parents[2] / "examples"
LOOKS = ("paper-cut", "pixel-art", "line-drawing", "neon", "stained-glass")
NUM_SUBJECTS = 12


@pytest.fixture(scope="module", autouse=True)
def _examples_on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def part(name):
    package = "icons" if name in ("icon_sets", "scenes", "vocabulary", "draw") else "styles"
    return importlib.import_module(f"{package}.{name}")


@pytest.fixture(scope="module")
def drawings(_examples_on_the_path):
    """A cross and a ring for twelve of the hundred subjects, each with a colour of its own."""
    made = {}
    for index, subject in enumerate(part("vocabulary").SUBJECTS[:NUM_SUBJECTS]):
        colour = f"#{(index * 2654435761) % 0xFFFFFF:06x}"
        bodies = (
            f'<path fill="{colour}" d="M12 2h8v10h10v8H20v10h-8V20H2v-8h10z"/>'
            '<circle cx="16" cy="16" r="5" fill="#fff"/>',
            f'<circle cx="16" cy="16" r="11" fill="none" stroke-width="6" stroke="{colour}"/>',
        )
        made[subject.name] = [
            part("icon_sets").Drawing("made", str(i), b, 32, 32) for i, b in enumerate(bodies)
        ]
    return made


def cross(size=256):
    """RGBA of a red cross on nothing."""
    drawing = np.zeros((size, size, 4), np.uint8)
    drawing[..., :3] = 255
    for rows, columns in ((slice(40, 216), slice(100, 156)), (slice(100, 156), slice(40, 216))):
        drawing[rows, columns] = (210, 40, 30, 255)
    return drawing


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_is_a_function_of_drawing_and_seed(look):
    looks = part("looks")
    draw = [looks.in_look(cross(), looks.LOOKS[look], random.Random(seed)) for seed in (0, 0, 1)]
    assert draw[0].shape == (64, 64, 3)
    assert draw[0].dtype == np.uint8
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any(), "something is left to chance"


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_keeps_the_shape(look):
    """The outline of the drawing is where the picture changes most."""
    looks = part("looks")
    picture = looks.in_look(cross(), looks.LOOKS[look], random.Random(0)).astype(float).mean(-1)
    steps = np.hypot(*np.gradient(picture))
    inside = cross()[::4, ::4, 3] > 0
    edge = np.zeros_like(inside)
    for axis in (0, 1):
        for move in (-2, -1, 1, 2):
            edge |= inside != np.roll(inside, move, axis)
    assert steps[edge].mean() > 2 * steps[~edge].mean()


def test_looks_differ_from_each_other_and_from_the_plain_drawing():
    looks = part("looks")
    pictures = [looks.in_look(cross(), looks.LOOKS[name], random.Random(0)) for name in LOOKS]
    pictures.append(cross()[::4, ::4, :3])
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            assert np.abs(one.astype(int) - other).mean() > 10


def test_pixels_are_large_and_few_coloured():
    looks = part("looks")
    picture = looks.in_look(cross(), looks.pixel_art, random.Random(0))
    cells = picture.reshape(32, 2, 32, 2, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) <= 8


def test_a_line_drawing_is_paper_and_ink():
    looks = part("looks")
    picture = looks.in_look(cross(), looks.line_drawing, random.Random(0)).astype(float).mean(-1)
    assert 0.04 < (picture < 128).mean() < 0.35, "lines, and nothing filled"
    assert picture[32, 32] > 200, "the middle of the cross"


def write(folder, style, drawings, seed=3):
    size = part("make_data").StyleSize(2, 1)
    part("make_data").write_style(folder, style, drawings, size, seed)
    return [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()]


def test_captions_are_those_of_the_base_without_a_word_for_the_style(drawings, tmp_path):
    rows = write(tmp_path / "data", "paper-cut", drawings)
    assert len(rows) == 2 * NUM_SUBJECTS, "subjects that no set shows are left out"
    by_name = {subject.name: subject for subject in part("vocabulary").SUBJECTS}
    for row in rows:
        (name,) = row["subjects"]
        assert row["text"] == by_name[name].with_article
        assert name in drawings


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(drawings, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write(tmp_path / name, "neon", drawings, seed)
    one, two, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("one", "two", "other")
    )
    assert one == two
    assert one != other
    assert len(one) == 3 * NUM_SUBJECTS


def test_a_large_drawing_has_no_background_and_lies_where_the_small_one_does(drawings):
    scenes, make_data = part("scenes"), part("make_data")
    scene = scenes.make_scene(random.Random(0), part("vocabulary").SUBJECTS[0], drawings)
    large = make_data._large_and_transparent(scene)
    assert large.shape == (256, 256, 4)
    small = part("draw").to_pixels(scene).astype(int)
    background = np.asarray([int(scene.background[i : i + 2], 16) for i in (1, 3, 5)])
    is_drawn = np.abs(small - background).sum(-1) > 60
    is_opaque = large[..., 3].reshape(64, 4, 64, 4).mean((1, 3)) > 100
    assert (is_drawn == is_opaque).mean() > 0.97
    assert (large[..., 3] == 0).mean() > 0.2


def test_only_permissive_styles_are_shipped():
    styles = part("recipes").STYLES
    assert {name for name, style in styles.items() if style.is_shipped} == {
        *LOOKS,
        "fluent-emoji",
        "fluent-emoji-high-contrast",
    }
    assert {name: styles[name].licences for name in ("twemoji", "openmoji", "emojione")} == {
        "twemoji": ("CC-BY-4.0",),
        "openmoji": ("CC-BY-SA-4.0",),
        "emojione": ("CC-BY-4.0",),
    }
    assert (
        not {name for style in styles.values() for name in style.sets} - part("icon_sets").PACKAGES.keys()
    )


def test_the_base_with_a_lora_in_its_weights_says_what_the_lora_says(tmp_path):
    from diffusers import StableDiffusionPipeline

    base = tiny_sd(tmp_path / "base")
    unet = load_diffusion_base(base).unet
    sites = {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "conv1")) and hasattr(module, "weight")
    }
    pairs = {}
    for name, module in sites.items():
        weight = module.weight
        kernel = (3, 3) if weight.dim() == 4 else None
        a, b = torch.randn(3, weight[0].numel()), torch.randn(len(weight), 3)
        pairs[name] = LoraPair(a, b, 0.1, kernel)
    save_adapter(Adapter(pairs), tmp_path / "lora", "diffusers")
    part("merge").write_merged(base, tmp_path / "lora", tmp_path / "merged")

    given = dict(sample=torch.randn(2, 4, 8, 8), timestep=499, encoder_hidden_states=torch.randn(2, 5, 16))
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        plain = pipeline.unet(**given).sample
        pipeline.load_lora_weights(tmp_path / "lora")
        wanted = pipeline.unet(**given).sample
        merged = load_diffusion_base(tmp_path / "merged").unet(**given).sample
    assert (wanted - plain).abs().max() > 0.1 * plain.abs().max()
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=1e-4)


def test_the_recipe_says_what_is_missing(tmp_path):
    done = subprocess.run(
        [EXAMPLES / "styles" / "run.sh", "neon"],
        env=os.environ | {"MANYLORA_ICONS_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"no base at runs/icons/pipeline in {tmp_path}: run examples/icons/run.sh" in done.stderr
