"""The base of icons and its LoRAs as they are shipped: whole, small, each with an effect, and fast where promised."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from manylora.image.params import ImageParams
from manylora.lora.library import Library

ICONS = Path(__file__).parents[2] / "examples" / "icons"
SHIPPED = json.loads((ICONS / "shipped.json").read_text())
LORAS = sorted(path.name for path in (ICONS / "loras").iterdir())
PROMPTS = ("a cat", "a pizza", "a rocket", "a heart", "a panda", "a house")


def test_every_file_is_the_one_that_was_shipped():
    found = {
        str(path.relative_to(ICONS)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("model", "loras")
        for path in (ICONS / folder).rglob("*")
        if path.is_file()
    }
    assert found == {name: told["sha256"] for name, told in SHIPPED.items()}


def test_all_weights_of_the_repository_stay_below_forty_megabytes():
    weights = list(ICONS.parent.rglob("*.safetensors"))
    assert len(weights) > len(LORAS) + 3
    assert sum(path.stat().st_size for path in weights) <= 40e6


@pytest.fixture(scope="module")
def base():
    from manylora.models.diffusion_base import load_diffusion_base

    return load_diffusion_base(str(ICONS / "model"), dtype=torch.float32, device="cpu")


def pictures(base, mixtures, params):
    """Return [mixtures, prompts, 64, 64, 3], in 0..1."""
    import numpy as np

    from manylora.image.config import ImageEngineConfig
    from manylora.image.engine import ImageEngine

    jobs = [(prompt, mixture) for mixture in mixtures for prompt in PROMPTS]
    with ImageEngine(base, Library(ICONS / "loras"), ImageEngineConfig(max_batch=64)) as engine:
        made = engine.generate([p for p, _ in jobs], params, [m for _, m in jobs])
    assert not [picture.error for picture in made if picture.error]
    pixels = np.stack([np.asarray(picture.image) for picture in made]).astype(np.float64) / 255
    return pixels.reshape(len(mixtures), len(PROMPTS), 64, 64, 3)


def test_every_lora_changes_the_pictures_and_each_in_its_own_way(base):
    none, *each = pictures(base, [None, *LORAS], ImageParams(sampler="ddim", steps=4, guidance=2.0, seed=3))
    for index, (name, one) in enumerate(zip(LORAS, each, strict=True)):
        assert abs(one - none).mean() > 0.02, name
        for other in each[:index]:
            assert abs(one - other).mean() > 0.02, name


def test_one_step_with_the_lcm_lora_is_nearer_to_the_teacher_than_one_without(base):
    """From the same noise: at one step nothing else is drawn, so that pictures can be compared one by one."""
    guidance = json.loads((ICONS / "loras" / "lcm" / "distill.json").read_text())["guidance"]
    (teacher,) = pictures(base, [None], ImageParams(sampler="ddim", steps=50, guidance=guidance, seed=5))
    with_lora, without = pictures(base, ["lcm", None], ImageParams(sampler="lcm", steps=1, seed=5))
    assert ((with_lora - teacher) ** 2).mean() < 0.7 * ((without - teacher) ** 2).mean()


@pytest.fixture
def ship(monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(str(ICONS.parent))
    return importlib.import_module("icons.ship").ship


def half(folder, dtype=torch.float16):
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(8, 8, dtype=dtype)}, folder / "weights.safetensors")
    return folder


def test_shipping_copies_what_is_half_precision_and_fits(ship, tmp_path):
    half(tmp_path / "loras" / "lcm")
    told = ship(half(tmp_path / "pipeline"), tmp_path / "loras", ["lcm"], tmp_path / "out", 1000)
    assert sorted(told) == ["loras/lcm/weights.safetensors", "model/weights.safetensors"]
    for name, about in told.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == about["sha256"]
    assert json.loads((tmp_path / "out" / "shipped.json").read_text()) == told


def test_shipping_refuses_single_precision_and_too_many_bytes(ship, tmp_path):
    from manylora.errors import DataError

    half(tmp_path / "loras" / "lcm")
    single = half(tmp_path / "single", torch.float32)
    with pytest.raises(DataError, match=r"weight is F32, expected F16"):
        ship(single, tmp_path / "loras", ["lcm"], tmp_path / "out", 1000)
    with pytest.raises(DataError, match="leave some LoRAs out"):
        ship(half(tmp_path / "pipeline"), tmp_path / "loras", ["lcm"], tmp_path / "out", 300)
    assert not (tmp_path / "out").exists()
