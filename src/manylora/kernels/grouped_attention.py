"""Paged attention in torch operations over tiles of sequences, for any device.

A tile is a set of sequences with as many new tokens each and contexts of about one length, small enough for the cache.
Per tile two index_selects fetch keys and values and one scaled_dot_product_attention does the rest. What depends on the
sequences alone is computed once per step and kept on them, for all layers.
"""

# Shapes: as in kv.py; H query heads. In a tile: N sequences of n new tokens each, C tokens of the longest context.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manylora.kernels.kv import KvLayout, PagedSequences
from manylora.kernels.scratch import fetch_room

TILE_BYTES = 4 << 20
"""Cap of the keys and values of a tile; a longer sequence is a tile of its own. 1 to 8 MiB measured alike."""

PADDING_TOKENS = 256
"""Padding that a tile may hold. To read and mask as many tokens costs about what another call does."""


def paged_attention(
    q: Tensor, pages: Tensor, layout: KvLayout, layer: int, sequences: PagedSequences, *, scale: float
) -> Tensor:
    """See ops.paged_attention."""
    key = (layout, q.dtype, len(pages))
    plan: Plan | None = sequences.kept.get(key)
    if plan is None:
        # Scratch made in inference mode could not be written outside of it, and the plan may outlive the mode.
        with torch.inference_mode(False):
            plan = sequences.kept[key] = Plan(sequences, *key)
    keys, values = layout.slots(pages, layer)
    q = q.contiguous() if plan.order is None else q.index_select(0, plan.order)
    out = torch.empty_like(q)
    for tile in plan.tiles:
        k, v = tile.fetch(keys, values, layout)
        tile.attend(q[tile.rows], k, v, out[tile.rows], scale)
    return out if plan.inverse is None else out.index_select(0, plan.inverse)


@dataclass(frozen=True, slots=True)
class Tile:
    """N sequences with n new tokens each, and the scratch that their keys and values are fetched into."""

    shape: tuple[int, int]  # N, n
    rows: slice  # of q in the order of the plan
    slot: Tensor  # [N * C]  int64, where each token of the context lies in KvLayout.slots
    mask: Tensor | None  # [N, 1, n, C]  0 or -inf; None where is_causal says it, or nothing needs saying
    narrow: Tensor  # [2, N * C, KVH * HD]  in the dtype of the layout
    wide: Tensor  # the same in the dtype of q; `narrow` itself where that is the same

    def fetch(self, keys: Tensor, values: Tensor, layout: KvLayout) -> tuple[Tensor, Tensor]:
        """Keys and values of the contexts, valid until the next fetch. -> two [N, KVH, C, HD]"""
        torch.index_select(keys, 0, self.slot, out=self.narrow[0])
        torch.index_select(values, 0, self.slot, out=self.narrow[1])
        if self.wide is not self.narrow:
            self.wide.copy_(self.narrow)
        k, v = self.wide.view(2, self.shape[0], -1, layout.num_kv_heads, layout.head_dim).transpose(2, 3)
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        """q, out: [N * n, H, HD], k, v: as fetched."""
        N, n = self.shape
        KVH, HD = k.shape[1], k.shape[3]
        if n == 1:
            # The query heads that share a key head stand as its queries, so that each key is read once.
            attended = scaled_dot_product_attention(
                q.view(N, KVH, -1, HD), k, v, attn_mask=self.mask, scale=scale
            )
            out.view(attended.shape).copy_(attended)
        else:
            q = q.view(N, n, -1, HD).transpose(1, 2)
            is_causal = self.mask is None
            attended = scaled_dot_product_attention(
                q, k, v, attn_mask=self.mask, is_causal=is_causal, scale=scale, enable_gqa=True
            )
            out.view(N, n, -1, HD).copy_(attended.transpose(1, 2))


class Plan:
    """The tiles of a step, and the order of the rows of q in which each tile's rows are consecutive.

    order and its inverse are None where the rows of q stand so already.
    """

    def __init__(
        self, sequences: PagedSequences, layout: KvLayout, dtype: torch.dtype, num_pages: int
    ) -> None:
        table = sequences.check_pages(num_pages, layout.page_tokens)
        num_new, num_tokens = np.diff(sequences.query_bounds), sequences.num_tokens
        by_size = np.lexsort((num_tokens, num_new))
        by_size = by_size[num_new[by_size] > 0]
        ends = np.cumsum(num_new[by_size])
        first_row = sequences.query_bounds[:-1][by_size] - (ends - num_new[by_size])
        rows = np.repeat(first_row, num_new[by_size]) + np.arange(num_new.sum())
        in_order = bool((np.diff(rows) == 1).all())
        device = sequences.context_len.device
        self.order = None if in_order else torch.from_numpy(rows).to(device)
        self.inverse = None if in_order else torch.from_numpy(np.argsort(rows)).to(device)
        self.tiles = []
        token_bytes = 2 * layout.token_dim * dtype.itemsize
        for first, last in _cut(num_new[by_size], num_tokens[by_size], token_bytes):
            chosen, n = by_size[first:last], int(num_new[by_size[first]])
            slot = _slots(table[chosen], num_tokens[chosen], layout)
            shape = (2, slot.size, layout.token_dim)
            narrow, wide = fetch_room(sequences.kept, shape, layout.dtype, dtype, device)
            self.tiles.append(
                Tile(
                    shape=(len(chosen), n),
                    rows=slice(int(ends[last - 1]) - len(chosen) * n, int(ends[last - 1])),
                    slot=torch.from_numpy(slot).to(device),
                    mask=_mask(num_tokens[chosen], n, dtype, device),
                    narrow=narrow,
                    wide=wide,
                )
            )


def _cut(
    num_new: NDArray[np.int64], num_tokens: NDArray[np.int64], token_bytes: int
) -> Iterator[tuple[int, int]]:
    """Begin and end of each tile of sequences that are sorted by new tokens and then by length."""
    news, lengths = num_new.tolist(), num_tokens.tolist()
    first = used = 0
    for i, (new, length) in enumerate(zip(news, lengths, strict=True)):
        size = (i + 1 - first) * length
        fits = size * token_bytes <= TILE_BYTES and size - (used + length) <= PADDING_TOKENS
        if i > first and not (fits and new == news[first]):
            yield first, i
            first, used = i, 0
        used += length
    if news:
        yield first, len(news)


def _slots(table: NDArray[np.int64], num_tokens: NDArray[np.int64], layout: KvLayout) -> NDArray[np.int64]:
    """Where each token of these sequences lies in KvLayout.slots, all padded to the longest. [N * C]"""
    # Padding repeats a sequence's last token: it is masked, but a NaN would reach the result through any mask.
    token = np.minimum(np.arange(num_tokens.max()), num_tokens[:, None] - 1)
    page = table[np.arange(len(table))[:, None], token // layout.page_tokens]
    slot: NDArray[np.int64] = page * layout.page_stride + token % layout.page_tokens
    return slot.reshape(-1)


def _mask(num_tokens: NDArray[np.int64], n: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What is added to the scores of n new tokens of each sequence, [N, 1, n, C]; None where is_causal will do."""
    context_len = int(num_tokens.max())
    if (num_tokens == context_len).all() and n in (1, context_len):
        return None
    last_seen = num_tokens[:, None] - n + np.arange(n)  # [N, n]
    unseen = torch.from_numpy(np.arange(context_len) > last_seen[:, None, :, None])
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf).to(device)
