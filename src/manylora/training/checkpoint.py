"""Checkpoints from which a run goes on to the bit. Knows tensors and JSON, no model, data or adapter format.

A checkpoint is a folder `step-00000040`:

    parameters.safetensors   what is trained, by name
    optimizer.pt             AdamW's moments; read back with weights_only, so no code in it can run
    rng.safetensors          torch's generators (dropout draws from them)
    state.json               step, the run's fingerprint, notes; written last

It appears whole or not at all. There is no file for the learning rate or the order of the data: both are functions
of the step and the seed.
"""

import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manylora.errors import TrainingError
from manylora.training.aside import directory_aside

_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` optimizer steps."""

    step: int
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    rng: Mapping[str, Tensor]
    fingerprint: Mapping[str, Any]
    """What must not change between a run and its continuation: settings, data, versions."""
    notes: Mapping[str, Any]
    """What the run has found out so far and needs again: losses before training, seconds spent."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint below `folder`, then delete all but the newest `keep`; returns its path."""
    target = folder / f"{_PREFIX}{checkpoint.step:08d}"
    with directory_aside(target) as aside:
        save_file(
            {name: t.detach().contiguous() for name, t in checkpoint.parameters.items()},
            aside / "parameters.safetensors",
        )
        torch.save(checkpoint.optimizer, aside / "optimizer.pt")
        save_file(dict(checkpoint.rng), aside / "rng.safetensors")
        state = {"step": checkpoint.step, "fingerprint": checkpoint.fingerprint, "notes": checkpoint.notes}
        (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in _step_folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_latest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint below `folder`; None where there is none.

    Raises:
        TrainingError: the newest checkpoint cannot be read. It was written whole, so the disk is at fault; falling
            back silently to an older one would hide that.
    """
    folders = _step_folders(folder)
    if not folders:
        return None
    newest = folders[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(
            step=state["step"],
            parameters=load_file(newest / "parameters.safetensors"),
            # A GPU's moments are read where there is none; the optimizer takes them to its parameters' device.
            optimizer=torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True),
            rng=load_file(newest / "rng.safetensors"),
            fingerprint=state["fingerprint"],
            notes=state["notes"],
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"checkpoint {newest} cannot be read: {error}. Delete it to go on from the one before, or start afresh."
        ) from error


def rng_state() -> dict[str, Tensor]:
    """The state of torch's generators: the CPU's, and each CUDA device's where there are any."""
    state = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        state[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Put torch's generators back to what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


def _step_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()) if folder.is_dir() else []
