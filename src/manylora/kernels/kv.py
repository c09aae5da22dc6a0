"""Where the keys and values of a step's sequences lie in the pool, and how new ones are written there.

Knows index tensors only. A page holds the KV of `page_tokens` tokens, one plane per layer, so that one block table
serves all layers.
"""

# Shapes: N sequences, P pages of the longest of them, T new tokens of all sequences together, KVH key/value
# heads, HD head dimension.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.errors import ConfigError
from manylora.kernels.segments import check_index, on_host


@dataclass(frozen=True)
class KvLayout:
    """How a page holds KV: per layer a plane [2 (keys, values), page_tokens, num_kv_heads, head_dim] of dtype."""

    num_layers: int
    page_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise ConfigError(f"keys and values are floats, got dtype {self.dtype}")

    @cached_property
    def token_dim(self) -> int:
        """Elements of the keys (or values) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    @cached_property
    def page_bytes(self) -> int:
        return self.num_layers * 2 * self.page_tokens * self.token_dim * self.dtype.itemsize

    @cached_property
    def page_stride(self) -> int:
        """Tokens of room in a page over all layers, keys and values: how far apart in `slots` two pages are."""
        return self.num_layers * 2 * self.page_tokens

    def slots(self, pages: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Views of the keys and of the values of one layer: row page * page_stride + i is the i-th token of a page.

        The planes of a layer lie alike in every page, so a layer is the same rows read from a later beginning.
        """
        every = pages.view(self.dtype).view(-1, self.token_dim)
        first = 2 * layer * self.page_tokens
        return every[first:], every[first + self.page_tokens :]

    def check_pages(self, pages: Tensor) -> None:
        if (
            pages.dtype != torch.uint8
            or pages.dim() != 2
            or pages.shape[1] != self.page_bytes
            or not pages.is_contiguous()
        ):
            raise ConfigError(
                f"pages must be contiguous [num_pages, {self.page_bytes}] torch.uint8 to hold KV as {self}, "
                f"got {list(pages.shape)} {pages.dtype}"
            )

    def check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ConfigError(f"layer must be in 0..{self.num_layers - 1}, got {layer}")

    def planes(self, pages: Tensor, layer: int) -> Tensor:
        """A view of one layer's plane in every page. -> [num_pages, 2, page_tokens, KVH, HD]"""
        shape = (len(pages), self.num_layers, 2, self.page_tokens, self.num_kv_heads, self.head_dim)
        return pages.view(self.dtype).view(shape).select(1, layer)


@dataclass(frozen=True, eq=False)
class PagedSequences:
    """The sequences of one step: their pages, new tokens and lengths. Rows of one sequence are consecutive."""

    block_table: Tensor  # [N, P]  int32, pages of each sequence in order, -1 beyond them
    query_start: (
        Tensor  # [N + 1]  int32, rows query_start[i]:query_start[i + 1] are the new tokens of sequence i
    )
    context_len: Tensor  # [N]  int32, tokens of each sequence, the new ones included

    def __post_init__(self) -> None:
        check_index("PagedSequences.context_len", self.context_len, torch.int32)
        check_index("PagedSequences.query_start", self.query_start, torch.int32, len(self.context_len) + 1)
        table = self.block_table
        if table.dim() != 2 or table.dtype != torch.int32 or len(table) != len(self.context_len):
            raise ConfigError(
                f"PagedSequences.block_table must be [{len(self.context_len)}, *] torch.int32, "
                f"got {list(table.shape)} {table.dtype}"
            )

    @cached_property
    def query_bounds(self) -> NDArray[np.int64]:
        """query_start on the host, checked. [N + 1]"""
        starts = on_host(self.query_start)
        if starts[0] != 0 or (np.diff(starts) < 0).any():
            raise ConfigError(f"PagedSequences.query_start must rise from 0, got {starts.tolist()}")
        return starts

    @cached_property
    def num_tokens(self) -> NDArray[np.int64]:
        """context_len on the host, checked against the new tokens. [N]"""
        num_tokens, num_new = on_host(self.context_len), np.diff(self.query_bounds)
        if (num_tokens < num_new).any():
            i = int((num_tokens < num_new).argmax())
            raise ConfigError(
                f"sequence {i} has {num_new[i]} new tokens but context_len {num_tokens[i]}, which must include them"
            )
        return num_tokens

    def check_pages(self, num_pages: int, page_tokens: int) -> NDArray[np.int64]:
        """block_table on the host, once every sequence is known to have pages of the pool for all its tokens. [N, P]"""
        table = on_host(self.block_table)
        needed = -(-self.num_tokens // page_tokens)
        used = np.arange(table.shape[1]) < needed[:, None]
        bad = (needed > table.shape[1]) | (used & ((table < 0) | (table >= num_pages))).any(axis=1)
        if bad.any():
            i = int(bad.argmax())
            raise ConfigError(
                f"sequence {i} of {self.num_tokens[i]} tokens needs {needed[i]} pages of {page_tokens} tokens out of "
                f"{num_pages}, but its block table is {table[i].tolist()}"
            )
        return table

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What a backend derived from these sequences, under keys of its own."""
        return {}


def write_kv(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    layout: KvLayout,
    layer: int,
    slot_page: Tensor,
    slot_index: Tensor,
) -> None:
    """See ops.write_kv."""
    slot = slot_page * layout.page_stride + slot_index
    for slots, new in zip(layout.slots(pages, layer), (k, v), strict=True):
        slots.index_copy_(0, slot, new.reshape(-1, layout.token_dim).to(layout.dtype))
