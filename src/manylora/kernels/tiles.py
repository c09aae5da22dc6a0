"""Cuts the segments of a call into tiles: runs of neighbours that one batched product serves. Knows no x, y or h.

A tile's segments have the same number of entries, rank and dtype, and their rank rows together stay in cache.
"""

# Shapes: as in segments.py. In a tile: N segments of n entries each, r rank rows a segment, W elements a rank row.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.kernels.segments import ROW_DTYPES, RankRows, Segments

TILE_BYTES = 4 << 20
"""Cap of what a tile holds in scratch at a time: widened rank rows and products."""


@dataclass(frozen=True, slots=True)
class Tile:
    """N neighbouring segments with n entries and r rank rows each, and the scratch that they are fetched into."""

    shape: tuple[int, int, int]  # N, n, r
    first_segment: int
    first_entry: int
    rows: Tensor  # [N * n]  int32, row of each entry
    first_row: int | None  # the first of them where they are consecutive
    row_offset: Tensor  # [N * r]  int64, byte offset of each rank row
    raw: Tensor  # [N * r, row bytes]  uint8
    narrow: Tensor  # [N * r, W]  the same bytes in the dtype that they are stored in
    wide: Tensor  # [N * r, W]  in the compute dtype; `narrow` itself where that is the same

    def fetch(self, pool: Tensor) -> Tensor:
        """The rank rows in the compute dtype, valid until the next fetch. pool: all pages, flat. -> [N, r, W]"""
        # Row i of `windows` is the row that begins at byte i of the pool, so a byte offset is an index: rank rows may lie at
        # any alignment, and one call copies each whole.
        row_bytes = self.raw.shape[1]
        windows = pool.as_strided((pool.numel() - row_bytes + 1, row_bytes), (1, 1))
        torch.index_select(windows, 0, self.row_offset, out=self.raw)
        if self.wide is not self.narrow:
            self.wide.copy_(self.narrow)
        return self.wide.view(self.shape[0], self.shape[2], -1)

    def take(self, x: Tensor) -> Tensor:
        """The rows of x that the entries name, viewed where they are consecutive. -> [N, n, D]"""
        num_segments, num_entries, _ = self.shape
        if self.first_row is None:
            taken = x.index_select(0, self.rows)
        else:
            taken = x.narrow(0, self.first_row, num_segments * num_entries)
        return taken.view(num_segments, num_entries, -1)

    def add(self, y: Tensor, delta: Tensor) -> None:
        """Add delta [N, n, O] to the rows of y that the entries name; a row may be named by several."""
        if self.first_row is None:
            y.index_add_(0, self.rows, delta.flatten(0, 1).to(y.dtype))
        else:
            self.take(y).add_(delta)


def cut_tiles(
    segments: Segments,
    table: RankRows,
    width: int,
    compute: torch.dtype,
    joined: NDArray[np.bool_] | None = None,
) -> list[Tile]:
    """Cut the segments that have entries and rank rows into tiles.

    joined: [S - 1], False where a segment may not share a tile with the one before it, for the caller's own reasons.
    """
    num_entries, rank = segments.num_entries, table.rank
    if segments.num_segments == 0:
        return []
    same = (np.diff(num_entries) == 0) & (np.diff(rank) == 0) & (np.diff(segments.row_dtype_index) == 0)
    if joined is not None:
        same &= joined
    tiles = []
    for first, last in _runs(same):
        n, r = int(num_entries[first]), int(rank[first])
        if n == 0 or r == 0:
            continue
        max_segments = max(1, TILE_BYTES // ((n + r) * width * compute.itemsize))
        num_tiles = -(-(last - first) // max_segments)
        bounds = [first + (last - first) * i // num_tiles for i in range(num_tiles + 1)]
        tiles += [_tile(segments, table, width, compute, *b) for b in zip(bounds, bounds[1:], strict=False)]
    return tiles


def _runs(same: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Begin and end of each maximal run of segments, given whether each is of one kind with its predecessor. [S - 1]"""
    starts = [0, *(np.flatnonzero(~same) + 1).tolist(), len(same) + 1]
    return zip(starts, starts[1:], strict=False)


def _tile(
    segments: Segments, table: RankRows, width: int, compute: torch.dtype, first: int, last: int
) -> Tile:
    """The tile of segments first:last, which are of one kind."""
    n, r = int(segments.num_entries[first]), int(table.rank[first])
    entries = slice(int(segments.entry_start[first]), int(segments.entry_start[last]))
    num_rows = (last - first) * r
    dtype = ROW_DTYPES[segments.row_dtype_index[first]]
    raw = scratch(segments, "raw", num_rows * width, dtype)
    narrow = raw.view(num_rows, width)
    return Tile(
        shape=(last - first, n, r),
        first_segment=first,
        first_entry=entries.start,
        rows=segments.rows[entries],
        first_row=segments.first_row(entries.start, entries.stop),
        row_offset=table.row_offset.narrow(0, int(table.rank[:first].sum()), num_rows),
        raw=narrow.view(torch.uint8),
        narrow=narrow,
        wide=narrow
        if dtype == compute
        else scratch(segments, "wide", num_rows * width, compute).view(num_rows, width),
    )


def scratch(segments: Segments, name: str, num_elements: int, dtype: torch.dtype) -> Tensor:
    """Elements of a buffer that all calls on these segments reuse, because fresh memory costs a page fault per 4 KiB."""
    num_bytes = num_elements * dtype.itemsize
    buffer = segments.kept.get(name)
    if buffer is None or len(buffer) < num_bytes:
        buffer = segments.kept[name] = torch.empty(
            num_bytes, dtype=torch.uint8, device=segments.rows.device
        )
    return buffer[:num_bytes].view(dtype)
