"""The decoder's dense product. Knows no layer, site or adapter."""

# Shapes: T rows, D in-features, O out-features.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manylora.errors import ModelError
from manylora.kernels.native.int8 import Int8Weight

# oneDNN asks for the number of rows it shall lay the weight out for. A hint of 32 was the fastest, or as fast as any,
# at 1 to 512 rows; laid out for 1, the product takes up to 1.6 times as long at 8 rows.
_PACKED_FOR_ROWS = 32


class BaseProduct(nn.Module):
    """y = x W^T + b, for inference.

    Built with an empty weight that the loader fills; `finish` then chooses the implementation, once:

    * "onednn packed": the weight in oneDNN's own blocked layout, and no longer in ours. float32 on a CPU. Over all
      products of SmolLM2-135M it takes 0.87 of the time of "torch" at one row, 0.53 at 8, 0.66 at 32 and 0.79 at 128
      (one AVX-512 core), and a row's result is the same in a batch of any size, or for one row alone up to the
      order of a sum.
    * "int8": integers with a scale per output, and one per row of x and 32 inputs, in the native kernels
      (`kernels/native/int8.py`); on a CPU, and only where asked for, since it rounds. A row's result has the same bits
      in any batch.
    * "torch": `torch.nn.functional.linear`, everywhere else.
    """

    weight: Tensor | None  # [O, D]; None once packed
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
        self._packed: Tensor | None = None
        self._int8: Int8Weight | None = None

    @property
    def implementation(self) -> str:
        if self._int8 is not None:
            return "int8"
        return "torch" if self._packed is None else "onednn packed"

    def finish(self, *, int8: bool = False, keep_dense: bool = False) -> None:
        """Choose the implementation for the weight as it is now.

        Args:
            int8: round the weight to eight bits.
            keep_dense: leave `weight` in place when packing, for a caller who shares it (a tied embedding).
        """
        assert self.weight is not None
        if int8:
            self._int8 = Int8Weight.from_float(self.weight, self.bias)
        elif _can_pack(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _PACKED_FOR_ROWS)
        else:
            return
        if not keep_dense:
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, O], contiguous
        if self._packed is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
            return product
        if self._int8 is not None:
            return self._int8.product(x)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:  # [O, D]
        """Return the weight in the ordinary layout, and as it is multiplied; a copy where it is packed."""
        if self._int8 is not None:
            return self._int8.dense()
        if self.weight is not None:
            return self.weight
        assert self._packed is not None
        return self._packed.to_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._packed is not None or self._int8 is not None:
            raise ModelError(
                "a loaded model stays on its device and in its dtype: its weights are laid out for them; "
                "load it again with the device and dtype you want"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
