"""The base product on eight-bit integers, for CPUs.

Weights keep a scale per output, activations get one per row as they come. torch's dynamic quantised linear scales a
whole batch at once, so that one outlier row changes everybody's answer; here no row can change another's.

Fast with AVX-512 VNNI; elsewhere the same integers are multiplied in plain loops.
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

LEVELS = 127
"""Integers go from -LEVELS to LEVELS."""


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight [O, D] as integers, laid out for the product."""

    packed: Tensor  # [O / STRIP, D / DEPTH, STRIP, DEPTH]  int8, both rounded up; zeros behind the weight
    scale: Tensor  # [O]  fp32, value of one step of each output's integers
    total: Tensor  # [O]  int32, sum of each output's integers
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
        weight = weight.float()
        scale = weight.abs().amax(dim=1) / LEVELS
        steps = torch.where(scale > 0, scale, 1)[:, None]
        integers = (weight / steps).round().to(torch.int8)
        padded = torch.zeros(_up(O, STRIP), _up(D, DEPTH), dtype=torch.int8)
        padded[:O, :D] = integers
        packed = padded.view(len(padded) // STRIP, STRIP, -1, DEPTH).transpose(1, 2).contiguous()
        total = integers.sum(dim=1, dtype=torch.int32)
        return cls(packed, scale, total, None if bias is None else bias.float(), (O, D))

    def product(self, x: Tensor) -> Tensor:  # [T, D] -> [T, O] fp32
        """y = x W^T + b with the integers of W and of each row of x."""
        O, D = self.shape  # noqa: E741
        if x.dim() != 2 or x.shape[1] != D or x.device.type != "cpu":
            raise ConfigError(f"x must be [*, {D}] on the CPU, got {list(x.shape)} on {x.device}")
        x = x.to(torch.float32)
        x = x if x.stride(1) == 1 else x.contiguous()
        y = torch.empty(len(x), O)
        native._core.int8_product(
            x.data_ptr(), x.stride(0), len(x), self.packed.data_ptr(), self.scale.data_ptr(), self.total.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(), O, D, y.data_ptr(), O, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def dense(self) -> Tensor:  # [O, D] fp32
        """The weight that the integers stand for."""
        O, D = self.shape  # noqa: E741
        strips = self.packed.transpose(1, 2).reshape(-1, self.packed.shape[1] * DEPTH)
        return strips[:O, :D].float() * self.scale[:, None]


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
