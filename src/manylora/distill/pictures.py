"""What the distiller asks of its data, and which of it each step sees. Knows no file and no encoder."""

# Shapes: N pictures, K captions, B rows of a batch.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.errors import DataError
from manylora.models.diffusion_base import Condition


class Pictures(Protocol):
    """Latents and conditions that were computed once and lie on disk."""

    @property
    def caption_rows(self) -> NDArray[np.int64]: ...  # [N], in [0, K)

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def left_out(self) -> Mapping[str, str]:
        """Pictures that could not be used: name to reason."""
        ...

    @property
    def content_hash(self) -> str: ...

    @property
    def num_cut(self) -> int:
        """Captions longer than the text encoder takes, whose ends it does not see."""
        ...

    def __len__(self) -> int: ...

    def latents_of(self, rows: Sequence[int]) -> Tensor: ...  # [B, 4, h, w]

    def conditions_of(self, caption_rows: Sequence[int]) -> Condition: ...


def batch_of(pictures: Pictures, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Condition]:
    """Return (latents [B, 4, h, w], condition) of some pictures, fp32, on a device."""
    captions = [int(pictures.caption_rows[row]) for row in rows]
    return pictures.latents_of(rows).to(device), pictures.conditions_of(captions).to(device)


class RowOrder:
    """Which pictures each micro-batch sees: every picture once an epoch, a function of the count alone.

    Raises:
        DataError: there is no picture.
    """

    def __init__(self, num_rows: int, batch: int, seed: int) -> None:
        if num_rows < 1:
            raise DataError("there is no picture to distil on")
        self.num_rows, self.batch, self.seed = num_rows, batch, seed
        self._permutation = lru_cache(maxsize=2)(self._shuffled)

    def rows(self, count: int) -> list[int]:
        """Return the pictures of micro-batch `count`, from 0; one that an epoch's end cuts goes on in the next."""
        places = range(count * self.batch, (count + 1) * self.batch)
        return [
            self._permutation(epoch)[index] for epoch, index in (divmod(p, self.num_rows) for p in places)
        ]

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(
            self.num_rows, generator=generator_at(self.seed, 0, epoch)
        ).tolist()
        return order


def generator_at(seed: int, *position: int) -> torch.Generator:
    """Return the generator of one place of a run: a continued run draws there what it would have drawn."""
    # Not sums: neighbouring places of neighbouring seeds must not draw the same.
    words = np.random.SeedSequence([seed, *position]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def about(pictures: Pictures) -> dict[str, Any]:
    """What a run says of its data."""
    empty = sum(not pictures.captions[row] for row in pictures.caption_rows)
    return {
        "num_pictures": len(pictures),
        "num_captions": len(pictures.captions),
        "num_without_caption": int(empty),
        "num_left_out": len(pictures.left_out),
        "num_captions_cut": pictures.num_cut,
        "content_hash": pictures.content_hash,
    }
