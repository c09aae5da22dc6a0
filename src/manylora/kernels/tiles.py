"""Cuts the rank rows of a call into tiles that stay in cache, and each tile into batched products.

Knows how many entries and rank rows each segment has; neither where rank rows lie nor any x, y or h.
"""

# Shapes: as in segments.py. In a product: N segments of n entries each, r rank rows a segment.
# W elements of a rank row (D or O).

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.kernels.scratch import fetch_room, scratch
from manylora.kernels.segments import ROW_DTYPES, SCALE_BYTES, Segments, bytes_of_row

TILE_BYTES = 4 << 20
"""Widened rank rows of a tile. Smaller ones cost calls; at 16 MiB they leave the cache and take twice as long."""


@dataclass(frozen=True, slots=True)
class Product:
    """N neighbouring segments with n entries and r rank rows each: one batched matrix product."""

    shape: tuple[int, int, int]  # N, n, r
    weights: Tensor  # [N, r, W]  their rank rows, once the tile is fetched
    delta: Tensor  # [N, n, W]  room for h @ weights
    rows: Tensor  # [N * n]  int32, row of each entry
    first_row: int | None  # the first of them where they are consecutive, so that they can be viewed

    @property
    def num_hidden(self) -> int:
        N, n, r = self.shape
        return N * n * r

    def take(self, x: Tensor) -> Tensor:
        """The rows of x that the entries name. -> [N, n, D]"""
        N, n, _ = self.shape
        taken = (
            x.index_select(0, self.rows) if self.first_row is None else x.narrow(0, self.first_row, N * n)
        )
        return taken.view(N, n, -1)

    def add_to(self, y: Tensor, h: Tensor) -> None:
        """y[rows] += h [N, n, r] @ weights, where several entries may name a row."""
        N, n, _ = self.shape
        if self.first_row is None:
            delta = torch.bmm(h, self.weights, out=self.delta)
            y.index_add_(0, self.rows, delta.flatten(0, 1).to(y.dtype))
            return
        y = self.take(y)
        # Adding within the product saves two passes over y, but torch takes strided results segment by segment.
        if y.dtype == h.dtype and (y.is_contiguous() or n >= 8 or N == 1):
            y.baddbmm_(h, self.weights)
        else:
            y.add_(torch.bmm(h, self.weights, out=self.delta))


@dataclass(frozen=True, slots=True)
class Tile:
    """Neighbouring rank rows of one dtype, the scratch that they are fetched into, and the products that use them."""

    rank_rows: slice  # of RankRows.row_offset
    raw: Tensor  # [num, bytes of a rank row]  uint8
    narrow: Tensor  # [num, W]  their values in the dtype that they are stored in
    wide: Tensor  # [num, W]  widened to the compute dtype; `narrow` itself where that is the same
    products: list[Product]

    def fetch(self, pool: Tensor, offset: Tensor) -> None:
        """Fill the weights of the products; they stay until the next fetch. pool: all bytes, offset: [num] int64."""
        # Row i of `windows` is the rank row that would begin at byte i of the pool. So a byte offset is an
        # index, rank rows may lie anywhere, and one call copies each of them whole.
        row_bytes = self.raw.shape[1]
        windows = pool.as_strided((pool.numel() - row_bytes + 1, row_bytes), (1, 1))
        torch.index_select(windows, 0, offset, out=self.raw)
        if self.wide is not self.narrow:
            self.wide.copy_(self.narrow)
        if self.narrow.dtype == torch.int8:
            # Copied, because bytes may be viewed as floats only where they are aligned to them.
            scale = self.raw[:, :SCALE_BYTES].clone(memory_format=torch.contiguous_format)
            scale = scale.view(-1).view(torch.float32).view(-1, 1)  # [num, 1]
            self.wide.mul_(scale)


def cut_tiles(segments: Segments, rank: NDArray[np.int64], width: int, compute: torch.dtype) -> list[Tile]:
    """Tiles of all segments that have entries and rank rows. Equal calls on the same segments return the same list.

    rank: [S] rank rows of each segment, width: elements of each, compute: what they are widened to.
    """
    key = ("tiles", rank.tobytes(), width, compute)
    tiles: list[Tile] | None = segments.kept.get(key)
    if tiles is None:
        max_rows = max(1, TILE_BYTES // (width * compute.itemsize))
        runs = list(_runs(segments, rank, max_rows))
        tiles = [
            _tile(segments, group, rank, width, compute)
            for group in _groups(segments, runs, rank, max_rows)
        ]
        segments.kept[key] = tiles
    return tiles


def _runs(segments: Segments, rank: NDArray[np.int64], max_rows: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of segments of one kind, so short that its rank rows and products fit a tile."""
    num_entries, dtype = segments.num_entries, segments.row_dtype_index
    kinds = list(zip(num_entries.tolist(), rank.tolist(), dtype.tolist(), strict=True))
    first = 0
    for s in range(1, len(kinds) + 1):
        n, r, _ = kinds[first]
        if s < len(kinds) and kinds[s] == kinds[first] and (s + 1 - first) * (n + r) <= max_rows:
            continue
        if n > 0 and r > 0:
            yield first, s
        first = s


def _groups(
    segments: Segments, runs: list[tuple[int, int]], rank: NDArray[np.int64], max_rows: int
) -> Iterator[list[tuple[int, int]]]:
    """The runs of each tile: neighbours of one dtype whose rank rows fit it together."""
    dtype = segments.row_dtype_index
    group: list[tuple[int, int]] = []
    for first, last in runs:
        if group:
            begin, end = group[0][0], group[-1][1]
            if end != first or dtype[first] != dtype[begin] or rank[begin:last].sum() > max_rows:
                yield group
                group = []
        group.append((first, last))
    if group:
        yield group


def _tile(
    segments: Segments,
    runs: list[tuple[int, int]],
    rank: NDArray[np.int64],
    width: int,
    compute: torch.dtype,
) -> Tile:
    """The tile of these runs of segments."""
    first = int(rank[: runs[0][0]].sum())
    num_rows = int(rank[runs[0][0] : runs[-1][1]].sum())
    dtype = ROW_DTYPES[segments.row_dtype_index[runs[0][0]]]
    device = segments.rows.device
    raw, narrow, wide = _room(segments, num_rows, width, dtype, compute)
    products, row = [], 0
    for begin, end in runs:
        N, n, r = end - begin, int(segments.num_entries[begin]), int(rank[begin])
        entries = slice(int(segments.entry_start[begin]), int(segments.entry_start[end]))
        weights = wide[row : row + N * r].view(N, r, width)
        delta = scratch(segments.kept, "delta", (N, n, width), compute, device)
        first_row = segments.first_row(entries.start, entries.stop)
        products.append(Product((N, n, r), weights, delta, segments.rows[entries], first_row))
        row += N * r
    return Tile(slice(first, first + num_rows), raw, narrow, wide, products)


def _room(
    segments: Segments, num_rows: int, width: int, dtype: torch.dtype, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Scratch for rank rows: raw, narrow and wide of a tile."""
    kept, device = segments.kept, segments.rows.device
    if dtype != torch.int8:
        narrow, wide = fetch_room(kept, (num_rows, width), dtype, compute, device)
        return narrow.view(torch.uint8), narrow, wide
    raw, wide = fetch_room(kept, (num_rows, bytes_of_row(dtype, width)), torch.uint8, compute, device)
    return raw, raw[:, SCALE_BYTES:].view(dtype), wide.view(-1)[: num_rows * width].view(num_rows, width)
