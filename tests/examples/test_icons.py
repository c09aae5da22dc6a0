"""The recipe of the small base: its data is what it says, and its training goes on to the bit.

Draws made-up shapes and trains networks of a few thousand parameters, so neither network nor minutes are needed.
"""

import importlib
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = dict(
    vae_channels=(8, 8, 8),
    unet_channels=(8, 16, 16),
    unet_heads=2,
    text_width=16,
    text_layers=1,
    norm_groups=4,
)


@pytest.fixture(scope="module", autouse=True)
def _examples_on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


pytestmark = pytest.mark.usefixtures("one_thread")  # networks this small only wait for a second one


def part(name):
    return importlib.import_module(f"icons.{name}")


@pytest.fixture(scope="module")
def drawings(_examples_on_the_path):
    """Two shapes a subject, each subject with a colour of its own."""
    made = {}
    for index, subject in enumerate(part("vocabulary").SUBJECTS):
        colour = f"#{(index * 2654435761) % 0xFFFFFF:06x}"
        bodies = (
            f'<path fill="{colour}" d="M2 2h28v20z"/>',
            f'<circle cx="18" cy="16" r="12" fill="{colour}"/>',
        )
        made[subject.name] = [
            part("icon_sets").Drawing("made", str(i), b, 32, 32) for i, b in enumerate(bodies)
        ]
    return made


@pytest.fixture(scope="module")
def image_folder(drawings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("icons") / "data"
    size = part("make_data").DataSize(2, 1)
    part("make_data").write_image_folder(folder, size, drawings, seed=3)
    return folder


def test_the_vocabulary_is_a_hundred_names_of_three_or_four_drawings_each():
    subjects, sets = part("vocabulary").SUBJECTS, part("icon_sets").BASE_SETS
    assert len({subject.with_article for subject in subjects}) == len(subjects) == 100
    assert {sum(s.icon_of(name) is not None for name in sets) for s in subjects} == {3, 4}
    assert next(s for s in subjects if s.name == "apple").with_article == "an apple"


def test_captions_say_what_is_shown_and_nothing_else(image_folder):
    rows = part("image_folder").read_metadata(image_folder / "train")
    by_name = {subject.name: subject for subject in part("vocabulary").SUBJECTS}
    for row in rows:
        (name,) = row["subjects"]
        assert row["text"] == by_name[name].with_article


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(drawings, image_folder, tmp_path):
    size = part("make_data").DataSize(2, 1)
    for seed in (3, 4):
        part("make_data").write_image_folder(tmp_path / str(seed), size, drawings, seed=seed)
    assert all_bytes(tmp_path / "3") == all_bytes(image_folder)
    assert all_bytes(tmp_path / "4") != all_bytes(image_folder)


def all_bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_one_caption_stands_for_many_pictures(drawings):
    cat = part("vocabulary").SUBJECTS[0]
    scenes = [part("scenes").make_scene(random.Random(i), cat, drawings) for i in range(20)]
    assert {scene.caption for scene in scenes} == {"a cat"}
    pictures = [part("draw").to_pixels(scene) for scene in scenes]
    assert len({picture.tobytes() for picture in pictures}) == 20


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_drawing_lands_where_its_placement_says(mirrored):
    scenes = part("scenes")
    square = part("icon_sets").Drawing("made", "square", '<path fill="#f00" d="M0 0h16v32H0z"/>', 32, 32)
    placed = scenes.Placement(square, (40.0, 20.0), 16.0, mirrored)
    pixels = part("draw").to_pixels(scenes.Scene("square", "a square", "#ffffff", placed))
    red_rows, red_columns = np.nonzero(pixels[:, :, 1] < 128)
    # The left half of a 16 px box round (40, 20); mirrored, the right half.
    left = 40 if mirrored else 32
    assert (red_columns.min(), red_columns.max()) == (left, left + 7)
    assert (red_rows.min(), red_rows.max()) == (12, 27)


def test_a_set_under_another_licence_is_refused():
    errors = importlib.import_module("manylora.errors")
    part("icon_sets").check_licence("noto", {"license": {"spdx": "Apache-2.0"}})
    with pytest.raises(errors.DataError, match=r"CC-BY-4\.0"):
        part("icon_sets").check_licence("noto", {"license": {"spdx": "CC-BY-4.0"}})


def test_every_word_is_a_token_and_every_caption_fits():
    captions = part("captions")
    tokenizer = captions.make_tokenizer()
    names = [subject.with_article for subject in part("vocabulary").SUBJECTS]
    for name in names:
        assert len(tokenizer.tokenize(name)) == len(name.split())
    longest = max(names, key=lambda name: len(name.split()))
    ids = captions.token_ids(tokenizer, [longest, ""])
    assert (ids[0] == tokenizer.eos_token_id).sum() > 1, "the longest caption leaves room for its end"
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 15
    assert len({tuple(row) for row in captions.token_ids(tokenizer, names)}) == len(names)
    # No text may become the unknown token, which is the end of the text.
    assert tokenizer.eos_token_id not in tokenizer("zébra, 7!", add_special_tokens=False)["input_ids"]


def test_the_normalised_vae_decodes_as_before():
    models, latents = part("models"), part("latents")
    vae = models.make_vae(models.ModelSize(**TINY)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    images = part("image_folder").to_unit_range(pixels)
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        mean, std = before.mean.mean(dim=(0, 2, 3)), before.mean.std(dim=(0, 2, 3))
        assert (std - 1).abs().min() > 0.05, "there is something to normalise"
        latents.fold_normalisation(vae, mean, std)
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)


def test_noising_turns_back_into_latents():
    """x0 = alpha z_t - sigma v, whatever the timestep."""
    student = tiny_student()
    latents, noise = torch.randn(5, 4, 16, 16), torch.randn(5, 4, 16, 16)
    timesteps = torch.tensor([0, 10, 500, 900, 999])
    noisy, v = student.noised(latents, noise, timesteps)
    alpha_bar = student.alpha_bar[timesteps][:, None, None, None]
    torch.testing.assert_close(
        alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * v, latents, atol=1e-5, rtol=1e-5
    )


def tiny_student():
    return part("student").Student(
        part("models").ModelSize(**TINY), part("captions").make_tokenizer(), seed=0
    )


def test_every_picture_comes_once_an_epoch_in_an_order_of_its_own():
    order = part("train_base").Order(num_rows=40, batch=8, seed=0)
    epochs = [np.concatenate([order.rows(step) for step in range(5 * e, 5 * e + 5)]) for e in range(2)]
    for rows in epochs:
        assert sorted(rows) == list(range(40))
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.fixture(scope="module")
def latents_folder(image_folder, tmp_path_factory):
    """Latents under a tiny VAE that has trained for some steps."""
    folder, train_vae = tmp_path_factory.mktemp("run"), part("train_vae")
    rows = part("image_folder").read_metadata(image_folder / "train")
    pixels = part("image_folder").read_pixels(image_folder / "train", rows)
    config = train_vae.VaeTraining(
        num_steps=30, crop_steps=25, batch=8, size=part("models").ModelSize(**TINY)
    )
    train_vae.train_vae(pixels, pixels, config, folder / "vae", say=lambda line: None)
    losses = [row["loss"] for row in read_rows(folder / "vae" / "metrics.jsonl") if "loss" in row]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), "the VAE learns"
    part("latents").write_latents(folder / "vae" / "vae", image_folder, folder / "latents")
    return folder / "latents"


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def base_config(**changes):
    settings = dict(
        num_steps=8, batch=8, checkpoint_every=2, look_every=4, look_captions=("a cat",), look_steps=2
    )
    return part("train_base").BaseTraining(
        **settings | changes, num_judged=8, size=part("models").ModelSize(**TINY)
    )


def test_a_train_step_moves_text_encoder_unet_and_average(latents_folder, tmp_path):
    base = part("train_base").BaseRun(
        latents_folder, tmp_path, base_config(num_steps=1), say=lambda line: None
    )
    before = {name: p.detach().clone() for name, p in base.student.parameters.items()}
    average = {name: p.clone() for name, p in base.student.averaged_tensors.items()}
    list(base.steps())
    unmoved = {name for name, p in base.student.parameters.items() if torch.equal(p, before[name])}
    assert not unmoved
    assert not [name for name, p in base.student.averaged_tensors.items() if torch.equal(p, average[name])]


def test_the_loss_falls(latents_folder, tmp_path):
    part("train_base").train_base(
        latents_folder,
        tmp_path,
        base_config(num_steps=60, look_every=60, learning_rate=3e-3),
        say=lambda line: None,
    )
    losses = [row["eval_loss"] for row in read_rows(tmp_path / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "samples" / "step-000060.png").is_file()
    assert (tmp_path / "loss.png").is_file()


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from pathlib import Path
from icons.models import ModelSize
from icons.train_base import BaseRun, BaseTraining
base = BaseRun(Path(sys.argv[2]), Path(sys.argv[3]), eval(sys.argv[4]), say=lambda line: None)
for record in base.steps():
    if record.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_ends_with_the_same_bits(latents_folder, tmp_path):
    whole = part("train_base").train_base(
        latents_folder, tmp_path / "whole", base_config(), say=lambda line: None
    )
    command = [
        sys.executable,
        "-c",
        KILLED,
        EXAMPLES,
        latents_folder,
        tmp_path / "killed",
        repr(base_config()),
    ]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    resumed = part("train_base").train_base(
        latents_folder, tmp_path / "killed", base_config(), say=lambda line: None
    )
    for name, tensor in (whole.student.parameters | whole.student.averaged_tensors).items():
        assert torch.equal(tensor, (resumed.student.parameters | resumed.student.averaged_tensors)[name]), (
            name
        )
    told = [
        [
            {k: row[k] for k in ("step", "loss", "eval_loss") if k in row}
            for row in read_rows(f / "metrics.jsonl")
        ]
        for f in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert told[0] == told[1]


def test_a_run_of_other_data_is_not_continued(latents_folder, tmp_path):
    errors = importlib.import_module("manylora.errors")
    part("train_base").train_base(
        latents_folder, tmp_path / "run", base_config(num_steps=2), say=lambda line: None
    )
    shutil.copytree(latents_folder, tmp_path / "other")
    about = json.loads((tmp_path / "other" / "about.json").read_text())
    about["sha256"]["train.latents.npy"] = "0" * 64
    (tmp_path / "other" / "about.json").write_text(json.dumps(about))
    with pytest.raises(errors.ConfigError, match="data"):
        part("train_base").train_base(tmp_path / "other", tmp_path / "run", base_config(num_steps=2))


def test_diffusers_opens_the_exported_base_and_draws_the_same(latents_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    base = part("train_base").train_base(
        latents_folder, tmp_path / "base", base_config(), say=lambda line: None
    )
    shutil.copytree(latents_folder.parent / "vae", tmp_path / "vae")
    size = part("models").ModelSize(**TINY)
    assert part("export").write_base(latents_folder, tmp_path / "base", tmp_path / "pipeline", size) == 8
    loaded = StableDiffusionPipeline.from_pretrained(
        tmp_path / "pipeline", safety_checker=None, feature_extractor=None
    )
    loaded.set_progress_bar_config(disable=True)
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {torch.float32}
    noise = part("student").starting_noise(2, seed=1)
    drawn = [
        pipeline(["a cat", "a hat"], latents=noise, num_inference_steps=3, output_type="np").images
        for pipeline in (base.student.pipeline(base.vae), loaded)
    ]
    assert drawn[0].shape == (2, 64, 64, 3)
    assert drawn[0].std() > 0.01
    np.testing.assert_allclose(drawn[0], drawn[1], atol=5e-3)  # written in half precision
    told = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert (told["base"]["steps"], told["vae"]["steps"]) == (8, 30)
    assert told["base"]["held_out"]["eval_loss"] > 0


def test_the_gate_is_closed_where_few_steps_equal_many_and_open_where_they_do_not():
    gate = part("gate")

    def rows(low):
        return [gate.GateRow(steps, 1.0, low + 0.01, low, low + 0.02, 8) for steps in (1, 2, 4, 8)]

    assert gate.is_open(rows(0.05), bound=0.02)
    assert not gate.is_open(rows(0.001), bound=0.02)
    assert gate.is_open([*rows(0.05)[:3], gate.GateRow(8, 1.0, 0.0, 0.0, 0.0, 8)], bound=0.02)


def test_the_gate_measures_nothing_where_nothing_differs():
    """Many steps against as many: the same noise gives the same latents. Fewer steps give others."""
    gate, student = part("gate"), tiny_student()
    pipeline = student.pipeline(part("models").make_vae(part("models").ModelSize(**TINY)).eval())
    measured = gate.measure(pipeline, ["a cat", "a hat"], (1.0, 2.5), many_steps=8)
    by_steps = {(row.steps, row.guidance): row.latent_mse for row in measured}
    assert by_steps[8, 1.0] == by_steps[8, 2.5] == 0.0
    assert min(by_steps[steps, guidance] for steps in (1, 2, 4) for guidance in (1.0, 2.5)) > 0


def test_the_interval_holds_the_mean_and_narrows_with_more_pictures():
    interval = part("gate").mean_interval
    values = np.random.default_rng(0).exponential(size=400)
    low, high = interval(values)
    few_low, few_high = interval(values[:25])
    assert low < values.mean() < high
    assert high - low < 0.5 * (few_high - few_low)
