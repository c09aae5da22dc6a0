"""The decoder's dense product. Knows no layer, site or adapter."""

# Shapes: T rows, D in-features, O out-features.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manylora.errors import ModelError
from manylora.kernels.native import tiles
from manylora.kernels.native.int8 import Int8Weight
from manylora.kernels.native.tiles import TileWeight

# oneDNN asks for the number of rows it shall lay the weight out for. A hint of 32 was the fastest, or as fast as any,
# at 1 to 512 rows; laid out for 1, the product takes up to 1.6 times as long at 8 rows.
_PACKED_FOR_ROWS = 32


class LaidOutWeight(Protocol):
    """A weight [O, D] in a layout of its own, with its bias."""

    def product(self, x: Tensor) -> Tensor:
        """y = x W^T + b. [T, D] -> [T, O], contiguous"""
        ...

    def dense(self) -> Tensor:
        """The weight that is multiplied, in the ordinary layout. [O, D]"""
        ...


class BaseProduct(nn.Module):
    """y = x W^T + b, for inference.

    Built with an empty weight that the loader fills; `finish` then chooses the implementation, once:

    * "tiles": six products of bfloat16 that add up to one of float32, on a CPU with AMX (`kernels/native/tiles.py`);
      or two, and a weight of eight bits. A row's result has the same bits in any batch.
    * "onednn": the weight in oneDNN's own blocked layout. float32 on other CPUs. Over all products of SmolLM2-135M it
      takes 0.87 of the time of "torch" at one row, 0.53 at 8, 0.66 at 32 and 0.79 at 128 (one AVX-512 core), and a
      row's result is the same in a batch of any size, or for one row alone up to the order of a sum.
    * "int8": integers with a scale per output, and one per row of x and 32 inputs, in the native kernels
      (`kernels/native/int8.py`); on other CPUs, and only where asked for, since it rounds. A row's result has the same
      bits in any batch.
    * "torch": `torch.nn.functional.linear`, everywhere else.
    """

    weight: Tensor | None  # [O, D]; None once laid out otherwise
    bias: Tensor | None  # [O]

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.register_buffer(
            "bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None
        )
        self._laid_out: LaidOutWeight | None = None
        self._is_rounded = False

    @property
    def is_rounded(self) -> bool:
        """Whether the weight is of eight bits."""
        return self._is_rounded

    @property
    def laid_out(self) -> LaidOutWeight | None:
        """The weight as the implementation has it; None: in the ordinary layout."""
        return self._laid_out

    @property
    def implementation(self) -> str:
        names = {TileWeight: "tiles", Int8Weight: "int8", _OnednnWeight: "onednn", type(None): "torch"}
        return names[type(self._laid_out)]

    def finish(self, *, int8: bool = False, keep_dense: bool = False) -> None:
        """Choose the implementation for the weight as it is now.

        Args:
            int8: round the weight to eight bits.
            keep_dense: leave `weight` in place, for a caller who shares it (a tied embedding).
        """
        weight = self.weight
        assert weight is not None
        self._is_rounded = int8
        is_float_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        if weight.device.type == "cpu" and (int8 or is_float_on_cpu) and tiles.is_available():
            self._laid_out = TileWeight.from_float(weight, self.bias, int8=int8)
        elif int8:
            self._laid_out = Int8Weight.from_float(weight, self.bias)
        elif is_float_on_cpu and _has_onednn():
            self._laid_out = _OnednnWeight(weight, self.bias)
        else:
            return
        if not keep_dense:
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, O], contiguous
        if self._laid_out is not None:
            return self._laid_out.product(x)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:  # [O, D]
        """Return the weight in the ordinary layout, and as it is multiplied; a copy where it is laid out otherwise."""
        if self.weight is not None and not self._is_rounded:
            return self.weight
        assert self._laid_out is not None
        return self._laid_out.dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._laid_out is not None:
            raise ModelError(
                "a loaded model stays on its device and in its dtype: its weights are laid out for them; "
                "load it again with the device and dtype you want"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class _OnednnWeight:
    """A float32 weight in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._bias = bias

    def product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return product

    def dense(self) -> Tensor:
        dense: Tensor = self._packed.to_dense()
        return dense


def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
