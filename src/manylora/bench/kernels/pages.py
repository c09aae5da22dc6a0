"""The pool that kernels are measured on: pages as an engine has them, handed out in random order."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.kernels import KvLayout
from manylora.models.config import LlamaConfig
from manylora.text.pool import page_tokens_of


def kv_layout(model: LlamaConfig, kv_dtype: torch.dtype, num_layers: int | None = None) -> KvLayout:
    """How the pages of an engine with this model hold KV; with another number of layers if one is given."""
    return KvLayout(
        num_layers=num_layers or model.num_layers,
        page_tokens=page_tokens_of(model, kv_dtype.itemsize),
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=kv_dtype,
    )


def scattered(num_pages: int, seed: int) -> Tensor:
    """The pages 0..num_pages - 1 in random order. [num_pages] int64"""
    return torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
