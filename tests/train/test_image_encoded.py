"""Latents and conditions on disk are those that the base makes; what cannot be used is counted and named."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from manylora.errors import DataError, TrainingError
from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd, tiny_sdxl
from manylora.train import image_encoded
from manylora.train.image_encoded import NO_CAPTION, encode_pictures, split_by_content
from manylora.train.image_pixels import decode
from tests.train.image_sets import disc, write_folder

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request, tmp_path_factory):
    make = {"sd": tiny_sd, "sdxl": tiny_sdxl}[request.param]
    return load_diffusion_base(make(tmp_path_factory.mktemp("base") / request.param))


@pytest.fixture
def pictures(tmp_path):
    return write_folder(tmp_path / "pictures", [disc(seed) for seed in range(11)])


def encode(base, path, folder, skip_empty=False):
    return encode_pictures(path, base, 16, skip_empty, folder, QUIET)


def test_what_is_stored_is_what_the_base_makes(base, pictures, tmp_path):
    data = encode(base, pictures, tmp_path / "encoded")
    assert data.latents.shape == (11, 4, 8, 8)
    pixels = torch.stack([decode(disc(seed)[0], 16) for seed in range(11)])
    wanted_latents = base.encode_images(pixels)
    assert wanted_latents.std() > 0.1
    torch.testing.assert_close(data.latents_of(range(11)), wanted_latents, atol=1e-3, rtol=1e-3)
    conditions = data.conditions_of(data.caption_rows[:3])
    wanted = base.encode_prompts([disc(seed)[1] for seed in range(3)], height=16, width=16)
    for got, want in zip(conditions._tensors(), wanted._tensors(), strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    nothing = data.conditions_of([NO_CAPTION])
    torch.testing.assert_close(
        nothing.embeddings, base.unconditional(height=16, width=16).embeddings, atol=2e-3, rtol=2e-3
    )
    assert not torch.allclose(nothing.embeddings, conditions.embeddings[:1], atol=1e-2)


def test_captions_whose_ends_are_cut_are_counted(base, tmp_path):
    picture, caption = disc(0)
    long = f"{caption} " + "red " * base.tokenizers[0].model_max_length
    assert not base.cut_off(caption)
    assert base.cut_off(long).split()[-1] == "red"
    path = write_folder(tmp_path / "pictures", [(picture, caption), (picture, long), (picture, long)])
    assert encode(base, path, tmp_path / "encoded").num_cut == 1  # distinct captions


def test_the_same_is_encoded_once_and_other_pictures_anew(base, pictures, tmp_path, monkeypatch):
    first = encode(base, pictures, tmp_path / "encoded")
    calls = []
    encode_images = DiffusionBase.encode_images

    def counted(*args):
        calls.append(args)
        return encode_images(*args)

    monkeypatch.setattr(DiffusionBase, "encode_images", counted)
    again = encode(base, pictures, tmp_path / "encoded")
    assert not calls
    np.testing.assert_array_equal(first.latents, again.latents)
    write_folder(pictures, [disc(seed) for seed in range(100, 111)])
    other = encode(base, pictures, tmp_path / "encoded")
    assert calls
    assert other.content_hash != first.content_hash


def test_what_cannot_be_used_is_named_and_empty_captions_are_kept_or_not(base, tmp_path):
    good = disc(0)[0]
    path = write_folder(
        tmp_path / "pictures",
        [(good, "a disc"), (b"no picture", "a disc"), (good[:90], "a disc"), (good, "")],
    )
    with (path / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "gone.png", "text": "a disc"}) + "\n")
    data = encode(base, path, tmp_path / "kept")
    assert len(data) == 2
    assert data.caption_rows.tolist() == [1, NO_CAPTION]
    assert set(data.left_out) == {"001.png", "002.png", "gone.png"}
    assert data.left_out["gone.png"] == "the file cannot be read"
    data = encode(base, path, tmp_path / "skipped", skip_empty=True)
    assert len(data) == 1
    assert data.left_out["003.png"] == "it has no caption"


def test_a_data_set_without_a_picture_that_can_be_used(base, tmp_path):
    path = write_folder(tmp_path / "pictures", [(b"no picture", "a disc")])
    with pytest.raises(DataError, match=r"none of its 1 pictures can be used\n  000\.png: cannot identify"):
        encode(base, path, tmp_path / "encoded")


def test_a_full_disk_leaves_nothing_behind(base, pictures, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_encoded, "_append", full)
    with pytest.raises(TrainingError, match=r"latents cannot be written to .*No space left on device"):
        encode(base, pictures, tmp_path / "encoded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 12), min_size=5, max_size=40), st.integers(0, 5), st.floats(0.05, 0.5))
def test_equal_pictures_never_stand_on_both_sides(numbers, seed, fraction):
    digests = [str(number) for number in numbers]
    if len(set(digests)) < 3:
        return
    train, held_out = split_by_content(digests, fraction, seed)
    assert sorted(train + held_out) == list(range(len(digests)))
    assert not {digests[row] for row in train} & {digests[row] for row in held_out}
    assert train
    assert held_out
    assert split_by_content(digests, fraction, seed) == (train, held_out)


def test_another_seed_holds_out_others_and_too_few_are_refused():
    digests = [str(number) for number in range(100)]
    assert split_by_content(digests, 0.2, seed=0)[1] != split_by_content(digests, 0.2, seed=1)[1]
    assert len(split_by_content(digests, 0.2, seed=0)[1]) == 20
    with pytest.raises(DataError, match="1 different pictures are too few to hold 50% of them out"):
        split_by_content(["a", "a"], 0.5, seed=0)
