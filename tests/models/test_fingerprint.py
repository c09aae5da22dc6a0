"""What a base is known by, on a real tiny one: the same read again is the same, any part changed is another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.models.diffusion_base import load_diffusion_base
from manylora.models.fingerprint import diffusion_fingerprint, weights_hash
from manylora.models.tiny_diffusion import tiny_sdxl


def shift_weights(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, file, {"format": "pt"})


def set_value(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CHANGES: dict[str, Callable[[Path], None]] = {
    "vae": lambda f: shift_weights(f / "vae/diffusion_pytorch_model.safetensors"),
    "latents' scale": lambda f: set_value(f / "vae/config.json", scaling_factor=0.5),
    "text encoder": lambda f: shift_weights(f / "text_encoder/model.safetensors"),
    "second text encoder": lambda f: shift_weights(f / "text_encoder_2/model.safetensors"),
    "prediction": lambda f: set_value(
        f / "scheduler/scheduler_config.json", prediction_type="v_prediction"
    ),
    "schedule": lambda f: set_value(f / "scheduler/scheduler_config.json", beta_schedule="linear"),
    "no prompt": lambda f: set_value(f / "model_index.json", force_zeros_for_empty_prompt=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_part_of_a_diffusion_base_counts(tmp_path, change):
    def fingerprint():
        return diffusion_fingerprint(load_diffusion_base(tmp_path))

    tiny_sdxl(tmp_path)
    before = fingerprint()
    assert json.loads(json.dumps(before)) == before == fingerprint()
    CHANGES[change](tmp_path)
    assert fingerprint() != before


def test_weights_are_known_by_name_shape_and_value():
    torch.manual_seed(1)
    one = torch.nn.Linear(2, 3)
    same = torch.nn.Linear(2, 3)
    same.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(same)
    with torch.no_grad():
        same.bias[0] += 1e-6
    assert (
        len({weights_hash(one), weights_hash(same), weights_hash(one.half()), weights_hash(one, one)}) == 4
    )
