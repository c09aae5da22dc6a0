"""The judge: trained on drawn pictures it knows others like them, goes on to the bit, and is known by its hash."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from manylora.bench.image.judge import JudgeNet, JudgeSize, load_judge, save_judge
from manylora.errors import ConfigError, ModelError
from manylora.training import TrainingRun

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = JudgeSize((4, 8, 8, 16))


@pytest.fixture(scope="module", autouse=True)
def _examples_on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


pytestmark = pytest.mark.usefixtures("one_thread")  # networks this small only wait for a second one


def part(name):
    return importlib.import_module(f"icons.{name}")


def made_data(num, seed):
    """A square in one of two corners: which of four colours says the name, which of two patterns the look."""
    draw = np.random.default_rng(seed)
    colours = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 20]])
    pixels = draw.integers(100, 150, (num, 32, 32, 3)).astype(np.uint8)
    names, looks = draw.integers(4, size=num), np.arange(num) % 2
    for picture, name, look in zip(pixels, names, looks, strict=True):
        corner = 16 * draw.integers(2)
        picture[corner : corner + 14, corner : corner + 14] = colours[name]
        if look:
            picture[::2] //= 2
    return part("judge_data").JudgeData(pixels, names, looks, ("plain", "striped"))


def training(**settings):
    values = dict(num_steps=120, batch=32, learning_rate=0.02, checkpoint_every=20, size=TINY, shift=1)
    return part("judge").JudgeTraining(**(values | settings))


def train(folder, config=None):
    said: list[str] = []
    judge = part("judge").train_judge(
        made_data(120, 0), made_data(60, 1), config or training(), folder, said.append
    )
    return judge, said


@pytest.fixture(scope="module")
def trained(tmp_path_factory, _examples_on_the_path):
    folder = tmp_path_factory.mktemp("judge")
    torch.set_num_threads(1)
    return folder, train(folder)[0]


def test_it_knows_pictures_that_it_has_not_seen(trained):
    _, judge = trained
    accuracy = judge.about["held_out_accuracy"]
    untrained = JudgeNet(len(judge.names), 2, TINY).eval()
    guessed = part("judge").held_out_accuracy(untrained, made_data(60, 1))
    assert guessed["name"] < 0.5
    assert accuracy["name"] > 0.9
    assert accuracy["look"] > 0.9


def test_a_run_that_is_cut_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    _, whole = trained
    steps = TrainingRun.steps

    def cut(self, losses):
        for record in steps(self, losses):
            yield record
            if record.step == 37:
                raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "steps", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    again, said = train(tmp_path)
    assert any("going on from step 20" in line for line in said)
    assert again.sha256 == whole.sha256
    assert train(tmp_path / "other", training(seed=1))[0].sha256 != whole.sha256


def test_other_settings_or_data_do_not_continue_a_run(trained):
    folder, _ = trained
    with pytest.raises(ConfigError, match="learning_rate"):
        train(folder, training(learning_rate=0.01))


def test_its_hash_says_which_judge_it_is(trained, tmp_path):
    folder, judge = trained
    read = load_judge(folder / "judge", judge.sha256)
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, theirs = judge.verdict(pixels), read.verdict(pixels)
    assert np.array_equal(ours.features, theirs.features)
    assert ours.features.std() > 0
    with torch.no_grad():
        read.net.names.bias[0] += 1e-6
    other = save_judge(tmp_path / "other", read.net, TINY, judge.names, judge.looks, {})
    assert other.sha256 != judge.sha256
    with pytest.raises(ModelError, match="figures of two judges cannot be compared"):
        load_judge(tmp_path / "other", judge.sha256)


def test_a_verdict_does_not_depend_on_the_batch(trained):
    _, judge = trained
    pixels = torch.rand(70, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    alone = judge.verdict(pixels[66:67])
    np.testing.assert_allclose(judge.verdict(pixels).features[66:67], alone.features, atol=1e-5)
    # What a file cannot hold is not judged: beyond the range is the end of the range.
    assert np.array_equal(
        judge.verdict(pixels * 9).features, judge.verdict((pixels * 9).clamp(-1, 1)).features
    )


def test_what_is_no_judge_is_refused(trained, tmp_path):
    folder, judge = trained
    with pytest.raises(ModelError, match=r"python -m icons\.judge"):
        load_judge(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "judge.json").write_bytes((folder / "judge" / "judge.json").read_bytes())
    (broken / "judge.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be read"):
        load_judge(broken)
    with pytest.raises(ModelError, match="dragon"):
        judge.subjects(["cat", "dragon"])


def test_a_picture_is_labelled_by_its_subject_and_by_the_set_that_drew_it(tmp_path):
    from PIL import Image

    folder = tmp_path / "train"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a dog", "subjects": ["dog"], "placed": {"drawing": "fxemoji:dog"}}\n'
    )
    data = part("judge_data").base_data(tmp_path, "train")
    assert [part("judge_data").NAMES[name] for name in data.names] == ["dog"]
    assert [data.look_names[look] for look in data.looks] == ["fxemoji"]
    assert data.pixels.shape == (1, 64, 64, 3)
