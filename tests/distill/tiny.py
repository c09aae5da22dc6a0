"""A tiny base and tiny pictures for it, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.distill import DistillConfig
from manylora.models.diffusion_base import Condition, DiffusionBase

CAPTIONS = ("", "a red circle", "two green squares", "a cat", "a house", "the sun")


@dataclass(frozen=True)
class TinyPictures:
    """Latents of unit spread with a caption each."""

    latents: Tensor  # [N, 4, 8, 8]
    conditions: Condition
    captions: Sequence[str] = CAPTIONS
    left_out: Mapping[str, str] = field(default_factory=dict)
    content_hash: str = "tiny"
    num_cut: int = 0

    @property
    def caption_rows(self) -> NDArray[np.int64]:
        return np.arange(len(self.latents)) % len(self.captions)

    def __len__(self) -> int:
        return len(self.latents)

    def latents_of(self, rows: Sequence[int]) -> Tensor:
        return self.latents[list(rows)]

    def conditions_of(self, caption_rows: Sequence[int]) -> Condition:
        return self.conditions.rows(list(caption_rows))


def tiny_pictures(base: DiffusionBase, num: int = 17) -> TinyPictures:
    latents = torch.randn(num, *base.latent_shape(), generator=torch.Generator().manual_seed(5))
    return TinyPictures(latents, base.encode_prompts(CAPTIONS))


def tiny_config(base: Path, folder: Path, **settings: Any) -> DistillConfig:
    values: dict[str, Any] = {
        "base": str(base),
        "data": folder / "pictures",
        "out": folder / "lcm",
        "runs_dir": folder / "runs",
        "guidance": 2.5,
        "num_steps": 6,
        "batch": 4,
        "rank": 4,
        "warmup_steps": 1,
        "eval_every": 100,
        "eval_rows": 2,
        "num_solver_steps": 5,
        "sample_steps": (1, 2),
        "checkpoint_every": 2,
        "device": "cpu",
        "out_dtype": "fp32",
    }
    return DistillConfig(**values | settings)
