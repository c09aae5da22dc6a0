"""Paged attention in torch operations over tiles of sequences, for any device.

A tile is a set of sequences with as many new tokens each and contexts of about one length, small enough for the cache.
Per tile two index_selects fetch keys and values and one scaled_dot_product_attention does the rest. What depends on the
sequences alone is computed once per step and kept on them, for all layers.
"""

# Shapes: as in kv.py; H query heads, G = H / KVH of them share a key/value head. In a tile: N sequences of
# n new tokens each, C tokens of the longest context.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manylora.kernels.kv import KvLayout, PagedSequences

TILE_BYTES = 4 << 20
"""Cap of the keys and values (and mask) of a tile. A longer sequence is a tile of its own."""

PADDING_TOKENS = 256
"""Padding that a tile may hold before a call of its own is cheaper."""


def paged_attention(
    q: Tensor, pages: Tensor, layout: KvLayout, layer: int, sequences: PagedSequences, *, scale: float
) -> Tensor:
    """See ops.paged_attention."""
    key = (layout, q.dtype, len(pages))
    plan = sequences.kept.get(key)
    if plan is None:
        sequences.kept[key] = plan = AttentionPlan(sequences, *key)
    slots = pages.view(layout.dtype).view(-1, layout.token_dim)
    q = plan.sort(q)
    out = torch.empty_like(q)
    for tile in plan.tiles:
        rows = slice(tile.first_row, tile.first_row + tile.num_sequences * tile.num_new)
        tile.attend(q[rows], out[rows], slots, layout, layer, scale)
    return plan.unsort(out)


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """N sequences with n new tokens each, whose rows are consecutive, and the scratch that their KV is fetched into."""

    num_sequences: int
    num_new: int
    first_row: int
    slot: Tensor  # [N * C]  int64, slot of each token of the context, counted in the keys of layer 0
    mask: (
        Tensor | None
    )  # [N, 1, n, C]  0 where a new token sees a token, else -inf; None where none or causality says all
    narrow: Tensor  # [2, N * C, KVH * HD]  in the dtype of the layout
    wide: Tensor  # [2, N * C, KVH * HD]  in the dtype of q; `narrow` itself where that is the same

    def attend(
        self, q: Tensor, out: Tensor, slots: Tensor, layout: KvLayout, layer: int, scale: float
    ) -> None:
        """q, out: [N * n, H, HD], slots: [num_slots, KVH * HD], all pages."""
        # The planes of a layer lie the same way in every page, so a layer is the same slots read from a
        # later beginning.
        for plane in range(2):
            of_layer = slots[(2 * layer + plane) * layout.page_tokens :]
            torch.index_select(of_layer, 0, self.slot, out=self.narrow[plane])
        if self.wide is not self.narrow:
            self.wide.copy_(self.narrow)
        N, n, KVH, HD = self.num_sequences, self.num_new, layout.num_kv_heads, layout.head_dim
        keys, values = self.wide.view(2, N, -1, KVH, HD).transpose(2, 3)
        if n == 1:
            # The query heads that share a key/value head stand as that head's queries: keys are read once,
            # none is repeated.
            grouped = scaled_dot_product_attention(
                q.view(N, KVH, -1, HD), keys, values, attn_mask=self.mask, scale=scale
            )
            out.view(grouped.shape).copy_(grouped)
        else:
            attended = scaled_dot_product_attention(
                q.view(N, n, -1, HD).transpose(1, 2),
                keys,
                values,
                attn_mask=self.mask,
                is_causal=self.mask is None,
                scale=scale,
                enable_gqa=True,
            )
            out.view(N, n, -1, HD).copy_(attended.transpose(1, 2))


class AttentionPlan:
    """The tiles of a step, and the order of the rows of q in which each tile's rows are consecutive."""

    def __init__(
        self, sequences: PagedSequences, layout: KvLayout, dtype: torch.dtype, num_pages: int
    ) -> None:
        table = sequences.check_pages(num_pages, layout.page_tokens)
        num_new, num_tokens = np.diff(sequences.query_bounds), sequences.num_tokens
        by_size = np.lexsort((num_tokens, num_new))
        by_size = by_size[num_new[by_size] > 0]
        rows = np.concatenate(
            [np.arange(0), *(np.arange(*sequences.query_bounds[[i, i + 1]]) for i in by_size)]
        )
        self.tiles: list[AttentionTile] = []
        first_row = 0
        for first, last in _cut(
            num_new[by_size], num_tokens[by_size], 2 * layout.token_dim * dtype.itemsize
        ):
            chosen = by_size[first:last]
            tile = _tile(
                sequences,
                table[chosen],
                num_tokens[chosen],
                int(num_new[chosen[0]]),
                first_row,
                layout,
                dtype,
            )
            self.tiles.append(tile)
            first_row += tile.num_sequences * tile.num_new
        in_order = (rows == np.arange(len(rows))).all()
        device = sequences.context_len.device
        self.order = None if in_order else torch.from_numpy(rows).to(device)
        self.inverse = None if in_order else torch.from_numpy(np.argsort(rows)).to(device)

    def sort(self, q: Tensor) -> Tensor:
        return q.contiguous() if self.order is None else q.index_select(0, self.order)

    def unsort(self, out: Tensor) -> Tensor:
        return out if self.inverse is None else out.index_select(0, self.inverse)


def _cut(
    num_new: NDArray[np.int64], num_tokens: NDArray[np.int64], token_bytes: int
) -> Iterator[tuple[int, int]]:
    """Begin and end of each tile of sequences that are sorted by new tokens and then by length."""
    first = 0
    for i in range(1, len(num_new) + 1):
        if i < len(num_new) and num_new[i] == num_new[first]:
            size = (i + 1 - first) * num_tokens[i]
            padding = size - num_tokens[first : i + 1].sum()
            if size * token_bytes <= TILE_BYTES and padding <= PADDING_TOKENS:
                continue
        yield first, i
        first = i


def _tile(
    sequences: PagedSequences,
    table: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    num_new: int,
    first_row: int,
    layout: KvLayout,
    dtype: torch.dtype,
) -> AttentionTile:
    """The tile of sequences with these pages [N, P], lengths [N] and new tokens each."""
    context_len = int(num_tokens.max())
    # Padding repeats a sequence's last token: it is masked, but a masked NaN would still reach the result.
    token = np.minimum(np.arange(context_len), num_tokens[:, None] - 1)  # [N, C]
    page = np.take_along_axis(table, token // layout.page_tokens, axis=1)
    slot = page * (layout.num_layers * 2 * layout.page_tokens) + token % layout.page_tokens
    device = sequences.context_len.device
    shape = (2, slot.size, layout.token_dim)
    narrow = _scratch(sequences, "narrow", shape, layout.dtype)
    return AttentionTile(
        num_sequences=len(table),
        num_new=num_new,
        first_row=first_row,
        slot=torch.from_numpy(slot.reshape(-1)).to(device),
        mask=_mask(num_tokens, num_new, dtype, device),
        narrow=narrow,
        wide=narrow if layout.dtype == dtype else _scratch(sequences, "wide", shape, dtype),
    )


def _mask(
    num_tokens: NDArray[np.int64], num_new: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What is added to the scores of a tile [N, 1, n, C]; None where is_causal (for one new token: nothing) says it."""
    context_len = int(num_tokens.max())
    if (num_tokens == context_len).all() and num_new in (1, context_len):
        return None
    last_seen = num_tokens[:, None] - num_new + np.arange(num_new)  # [N, n]
    unseen = torch.from_numpy(np.arange(context_len) > last_seen[:, None, :, None])
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf).to(device)


def _scratch(
    sequences: PagedSequences, name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """A buffer that all tiles and layers of a step reuse."""
    size = shape[0] * shape[1] * shape[2]
    buffer = sequences.kept.get(name)
    if buffer is None or len(buffer) < size:
        buffer = sequences.kept[name] = torch.empty(size, dtype=dtype, device=sequences.context_len.device)
    return buffer[:size].view(shape)
