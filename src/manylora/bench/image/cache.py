"""What a row took minutes to make, kept on disk: latents by what they depend on, verdicts by their judge as well.

A file appears whole or not at all, so a measurement that was killed goes on with the row it was at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from manylora.bench.image.judge import Judge, Verdict
from manylora.bench.image.sample import Sampled
from manylora.training.aside import directory_aside


def key_of(values: Mapping[str, Any]) -> str:
    """Return a short name for JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


class RowCache:
    """One folder for each row: `sampled.safetensors`, and a folder for each judge's verdict."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sampled(self, key: str, make: Callable[[], Sampled]) -> Sampled:
        """Return what is kept under the key; make and keep it where nothing is."""
        file = self.folder / key / "sampled" / "latents.safetensors"
        if not file.is_file():
            made = make()
            _write(file, {"latents": made.latents}, {"seconds": repr(made.seconds)})
        tensors, told = _read(file)
        return Sampled(tensors["latents"], float(told["seconds"]))

    def verdict(self, key: str, judge: Judge, make: Callable[[], Tensor]) -> Verdict:
        """Return the judge's verdict that is kept under the key; judge the pictures that `make` gives where none is.

        Args:
            make: gives pictures [N, 3, H, W] in [-1, 1].
        """
        file = self.folder / key / f"judged-{judge.sha256[:16]}" / "verdict.safetensors"
        if not file.is_file():
            made = judge.verdict(make())
            columns = {"features": made.features, "names": made.names, "looks": made.looks}
            _write(
                file, {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in columns.items()}, {}
            )
        tensors, _ = _read(file)
        return Verdict(tensors["features"].numpy(), tensors["names"].numpy(), tensors["looks"].numpy())


def _write(file: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    with directory_aside(file.parent) as aside:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, aside / file.name, dict(told)
        )


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}
