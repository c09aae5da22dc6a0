"""The base product in tiles of bfloat16 that add up to float32, for CPUs with AMX.

AMX multiplies bfloat16 alone. A float is the sum of three of them, and six of the nine products of two such sums are as
exact as a product of floats (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For
Higher-Precision Computations"). A weight rounded to eight bits is a bfloat16 as it is; activations are not rounded.
A checkpoint in bfloat16 has weights that are one bfloat16 each, one in half precision two: then the products with what
would be zero are left out, three of six or one, and the sums are the same.

A row's result has the same bits in a batch of any size.
"""

# Shapes: T rows, O outputs, D inputs.

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.errors import ConfigError, KernelUnavailable
from manylora.kernels import native
from manylora.kernels.native.int8 import input_rows, round_weight

TILE_OUTPUTS = 16
"""Outputs of a tile; a strip is two tiles of them."""

TILES = 2
"""Tiles of a strip."""

STEP = 32
"""Inputs of a tile; kStep of tiles.inl."""

MAX_STORED_PARTS = 2
"""Three would take more memory than the floats that they are parts of, and time to read it."""


@dataclass(frozen=True, eq=False)
class TileWeight:
    """A weight [O, D] laid out for the product: in float32, as bfloat16 that add up to it, or as integers with a scale
    per output."""

    packed: Tensor  # [O / 32, D / STEP, ...], zeros at the end of O and D
    # fp32 or int8: [..., TILES, STEP / 2, 2, TILE_OUTPUTS]; bf16: [..., parts, TILES, STEP / 2, TILE_OUTPUTS, 2]
    scale: Tensor | None  # [O]  fp32, value of one step of each output's integers; None for floats
    bias: Tensor | None  # [O]  fp32
    shape: tuple[int, int]  # O, D

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> TileWeight:
        """Lay out a weight [O, D] of any float dtype, in as few parts as hold it, or rounded as `round_weight` does."""
        if not is_available():
            raise KernelUnavailable("products in tiles need the native kernels and a processor with AMX")
        if weight.dim() != 2 or weight.device.type != "cpu":
            raise ConfigError(
                f"weight must be [O, D] on the CPU to be laid out, got {list(weight.shape)} on {weight.device}"
            )
        values, scale = round_weight(weight) if int8 else (weight.float(), None)
        O, D = weight.shape  # noqa: E741  the letters of the shape legend
        padded = F.pad(values, (0, -D % STEP, 0, -O % (TILES * TILE_OUTPUTS)))
        parts = None if int8 else _bfloat16_parts(padded)
        shape = (-1, TILES, TILE_OUTPUTS, padded.shape[1] // STEP, 2, STEP // 2)
        if parts is None:
            packed = padded.view(shape).permute(0, 3, 1, 5, 4, 2).to(torch.int8 if int8 else torch.float32)
        else:
            packed = torch.stack([part.view(shape) for part in parts]).permute(1, 4, 0, 2, 6, 3, 5)
        return cls(packed.contiguous(), scale, None if bias is None else bias.float(), (O, D))

    @property
    def parts(self) -> int:
        """How many bfloat16 are stored for each value; 0: it lies in memory as a float or an integer."""
        return self.packed.shape[2] if self.packed.dtype == torch.bfloat16 else 0

    def product(self, x: Tensor) -> Tensor:  # [T, D] -> [T, O] fp32
        """y = x W^T + b; x and sums in float32."""
        O, D = self.shape  # noqa: E741
        x = input_rows(x, D)
        y = torch.empty(len(x), O)
        native._core.tile_product(
            x.data_ptr(), x.stride(0), len(x), self.packed.data_ptr(),
            0 if self.scale is None else self.scale.data_ptr(), 0 if self.bias is None else self.bias.data_ptr(),
            self.parts, O, D, y.data_ptr(), O, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def dense(self) -> Tensor:  # [O, D] fp32
        """The weight that is multiplied, in the ordinary layout."""
        O, D = self.shape  # noqa: E741
        strips, steps = self.packed.shape[:2]
        if self.parts:
            laid_out = self.packed.float().sum(2).permute(0, 2, 4, 1, 5, 3)
        else:
            laid_out = self.packed.permute(0, 2, 5, 1, 4, 3)
        values = laid_out.reshape(strips * TILES * TILE_OUTPUTS, steps * STEP)[:O, :D].float()
        return values if self.scale is None else values * self.scale[:, None]


def _bfloat16_parts(values: Tensor) -> list[Tensor] | None:  # fp32 -> bf16, of the same shape
    """One or two bfloat16 whose sum is each value to its last bit; None where that takes more."""
    parts: list[Tensor] = []
    while len(parts) < MAX_STORED_PARTS:
        # Cut, not rounded, as native code takes floats apart: however a weight is stored, products have the same bits.
        part = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
        parts.append(part.bfloat16())
        values = values - part
        if not values.any():  # what is no number leaves one that is none
            return parts
    return None


def is_available() -> bool:
    """Whether this processor multiplies tiles of bfloat16, and the native kernels were built with them."""
    return native.AVAILABLE and "amx" in native._core.isas()
