"""LoRA by gathering a whole adapter for every row: what serving engines without a kernel for CPUs do.

Kept as the baseline of `manylora bench kernels`. Source: the torch operators behind vLLM's CPU backend
(`lora/ops/torch_ops`), in our words: site by site, adapters stacked in one tensor, each row's own picked out and
widened, then multiplied row by row.
"""

# Shapes: T rows, S adapters, r rank, D in-features, O out-features.

from __future__ import annotations

import torch
from torch import Tensor


def gather_shrink(x: Tensor, lora_a: Tensor, adapter: Tensor) -> Tensor:
    """Return h [T, r] = A of each row's adapter times its row.

    Args:
        x: [T, D] fp32.
        lora_a: [S, r, D], any float dtype.
        adapter: [T] int64, which of the S each row uses.
    """
    return torch.einsum("td,trd->tr", x, lora_a[adapter].to(x.dtype))


def gather_expand(y: Tensor, h: Tensor, lora_b: Tensor, adapter: Tensor) -> None:
    """y [T, O] += B of each row's adapter times its row of h [T, r]; lora_b [S, O, r], its scaling 1."""
    y += torch.einsum("tr,tor->to", h, lora_b[adapter].to(y.dtype))
