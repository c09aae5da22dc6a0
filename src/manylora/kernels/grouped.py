"""Shrink and expand in torch operations over tiles of segments, for any device.

Per tile one index_select fetches the rank rows, one copy widens them to the compute dtype and one bmm multiplies. No rank
is padded and no weight is fetched per token. What depends on the records alone is computed once and kept on them.
"""

# Shapes: as in segments.py. In a tile: N segments of n entries each, r rank rows a segment.

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manylora.kernels.segments import RankRows, Segments, on_host
from manylora.kernels.tiles import Tile, cut_tiles, scratch


def lora_shrink(x: Tensor, pages: Tensor, a: RankRows, segments: Segments) -> Tensor:
    """See ops.lora_shrink."""
    compute = torch.promote_types(x.dtype, torch.float32)
    key = (segments, pages.numel(), x.shape[1], compute)
    plan: ShrinkPlan = a.kept.get(key) or _keep(a, key, ShrinkPlan(a, *key))
    x = x.to(compute)
    pool = pages.view(-1)
    h = x.new_empty(plan.num_hidden)
    for tile, (first, last) in zip(plan.tiles, plan.hidden, strict=True):
        torch.bmm(tile.take(x), tile.fetch(pool).mT, out=h[first:last].view(tile.shape))
    return h


def lora_expand(
    y: Tensor,
    h: Tensor,
    pages: Tensor,
    b: RankRows,
    segments: Segments,
    h_begin: Tensor,
    h_stride: Tensor,
    scaling: Tensor,
) -> None:
    """See ops.lora_expand."""
    key = (segments, pages.numel(), y.shape[1], h.dtype, h_begin, h_stride, scaling)
    plan: ExpandPlan = b.kept.get(key) or _keep(b, key, ExpandPlan(b, *key))
    pool = pages.view(-1)
    for tile, (first, stride), gain, delta in zip(
        plan.tiles, plan.hidden, plan.gain, plan.delta, strict=True
    ):
        N, n, r = tile.shape
        h_tile = h[first:].as_strided((N, n, r), (n * stride, stride, 1)) * gain
        tile.add(y, torch.bmm(h_tile, tile.fetch(pool), out=delta))


class ShrinkPlan:
    """The tiles of a shrink and where the results of each lie in h."""

    def __init__(
        self, a: RankRows, segments: Segments, pool_bytes: int, width: int, compute: torch.dtype
    ) -> None:
        a.check_inside(pool_bytes, segments.row_bytes(width))
        self.tiles = cut_tiles(segments, a, width, compute)
        ends = [*accumulate((N * n * r for N, n, r in (tile.shape for tile in self.tiles)), initial=0)]
        self.num_hidden = ends[-1]
        self.hidden = [*zip(ends, ends[1:], strict=False)]


class ExpandPlan:
    """The tiles of an expand and, for each: where its h begins and its entry stride, its gains, room for its product."""

    def __init__(
        self,
        b: RankRows,
        segments: Segments,
        pool_bytes: int,
        width: int,
        compute: torch.dtype,
        h_begin: Tensor,
        h_stride: Tensor,
        scaling: Tensor,
    ) -> None:
        b.check_inside(pool_bytes, segments.row_bytes(width))
        begin, stride = on_host(h_begin), on_host(h_stride)
        # A tile reads its h as one strided tensor, so its segments must follow one another in h as its entries do.
        follows = (np.diff(begin) == (segments.num_entries * stride)[:-1]) & (np.diff(stride) == 0)
        self.tiles = cut_tiles(segments, b, width, compute, follows)
        self.hidden = [
            (int(begin[tile.first_segment]), int(stride[tile.first_segment])) for tile in self.tiles
        ]
        repeats = torch.from_numpy(segments.num_entries).to(scaling.device)
        gain = segments.weight.to(compute) * scaling.to(compute).repeat_interleave(repeats)
        self.gain, self.delta = [], []
        for tile in self.tiles:
            N, n, _ = tile.shape
            self.gain.append(gain.narrow(0, tile.first_entry, N * n).view(N, n, 1))
            self.delta.append(scratch(segments, "delta", N * n * width, compute).view(N, n, width))


def _keep(table: RankRows, key: tuple[Any, ...], plan: Any) -> Any:
    """Keep the plan of the latest call on its table, and no other: callers with fresh tensors must not pile up plans."""
    table.kept.clear()
    table.kept[key] = plan
    return plan
