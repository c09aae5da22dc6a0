"""The base product on eight-bit integers, for CPUs.

Weights keep a scale per output; activations get one per row and GROUP inputs as they come, since a few channels of a
language model are many times larger than the rest (Dettmers et al. 2022, LLM.int8). torch's dynamic quantised linear
scales a whole batch at once, so that one outlier row changes everybody's answer; here no row can change another's.

Fast with AVX-512 VNNI; elsewhere the same integers are multiplied in plain loops. Processors with AMX have a faster
product, which does not round activations (tiles.py).
"""

# Shapes: T rows, O outputs, D inputs.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.errors import ConfigError, KernelUnavailable
from manylora.kernels import native

STRIP = 32
"""Outputs that stand side by side in the packed weight; kStrip of int8.inl."""

DEPTH = 4
"""Inputs of an output that stand side by side; kDepth of int8.inl."""

GROUP = 32
"""Inputs of a row that share a scale; kGroup of int8.inl."""

ZERO = 128
"""What stands for zero in the packed weight; kZero of int8.inl."""

LEVELS = 127
"""Integers go from -LEVELS to LEVELS."""


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight [O, D] as integers, laid out for the product."""

    packed: Tensor  # [O / STRIP, D / DEPTH, STRIP, DEPTH]  uint8, ZERO added; both rounded up
    scale: Tensor  # [O]  fp32, value of one step of each output's integers
    bias: Tensor | None  # [O]  fp32
    shape: tuple[int, int]  # O, D

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None) -> Int8Weight:
        """Round a weight [O, D] of any float dtype; the largest magnitude of each output becomes LEVELS."""
        if not native.AVAILABLE:
            raise KernelUnavailable(
                "products on eight-bit integers need the native kernels, which are not built here: install a C++ "
                "compiler and then manylora again, or choose another dtype"
            )
        if weight.dim() != 2 or weight.device.type != "cpu":
            raise ConfigError(
                f"weight must be [O, D] on the CPU to be rounded, got {list(weight.shape)} on {weight.device}"
            )
        O, D = weight.shape  # noqa: E741  the letters of the shape legend
        integers, scale = round_weight(weight)
        padded = torch.full((_up(O, STRIP), _up(D, DEPTH)), ZERO, dtype=torch.uint8)
        padded[:O, :D] = integers + ZERO
        packed = padded.view(len(padded) // STRIP, STRIP, -1, DEPTH).transpose(1, 2).contiguous()
        return cls(packed, scale, None if bias is None else bias.float(), (O, D))

    def product(self, x: Tensor) -> Tensor:  # [T, D] -> [T, O] fp32
        """y = x W^T + b with the integers of W and of x."""
        O, D = self.shape  # noqa: E741
        x = input_rows(x, D)
        y = torch.empty(len(x), O)
        native._core.int8_product(
            x.data_ptr(), x.stride(0), len(x), self.packed.data_ptr(), self.scale.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(), O, D, y.data_ptr(), O, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def dense(self) -> Tensor:  # [O, D] fp32
        """The weight that the integers stand for."""
        O, D = self.shape  # noqa: E741
        strips = self.packed.transpose(1, 2).reshape(-1, self.packed.shape[1] * DEPTH)
        return (strips[:O, :D].float() - ZERO) * self.scale[:, None]


def input_rows(x: Tensor, width: int) -> Tensor:
    """x as float32 [T, width] with neighbouring elements in a row, or a ConfigError."""
    if x.dim() != 2 or x.shape[1] != width or x.device.type != "cpu":
        raise ConfigError(f"x must be [*, {width}] on the CPU, got {list(x.shape)} on {x.device}")
    x = x.to(torch.float32)
    return x if x.stride(1) == 1 else x.contiguous()


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [O, D] to integers from -LEVELS to LEVELS, the largest magnitude of each output to LEVELS.

    Returns:
        The integers, as float32 [O, D], and the value of one step of each output [O].
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / LEVELS
    steps = torch.where(scale > 0, scale, 1)[:, None]
    return (weight / steps).round(), scale


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
