"""Memory that all calls on one record reuse: fresh memory costs a page fault per 4 KiB, often more than the call."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor


def scratch(
    kept: dict[Any, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of any content in the buffer `name` of a record's `kept`; the next one of that name overwrites it."""
    num_bytes = prod(shape) * dtype.itemsize
    buffer = kept.get(name)
    if buffer is None or buffer.numel() < num_bytes:
        buffer = kept[name] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return buffer[:num_bytes].view(dtype).view(shape)


def fetch_room(
    kept: dict[Any, Any],
    shape: tuple[int, ...],
    stored: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(narrow, wide): where bytes of the pool are fetched to, and widened to; one tensor where the dtypes are one."""
    narrow = scratch(kept, "narrow", shape, stored, device)
    return narrow, narrow if stored == compute else scratch(kept, "wide", shape, compute, device)
