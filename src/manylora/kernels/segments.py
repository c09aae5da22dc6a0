"""Which rows of a batch use which adapter, and where the rank rows of those adapters lie in the pool.

Knows index tensors only: no adapter, request, page owner or model. The records are made once per step and handed to
every call of it, so whatever a backend derives from them is kept on them. Do not change their tensors afterwards.
"""

# Shapes: T rows of the batch, S segments (one adapter each), L entries (row, adapter) of all segments
# together; a row of a mixture stands in several segments. R rank rows in the table of a step. D, O in- and
# out-features.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.errors import ConfigError

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""What a rank row may be stored in. `Segments.row_dtype` holds positions in this tuple."""

FLOAT_ROW_DTYPES = ROW_DTYPES[:3]
"""Of these an adapter may be, and keys and values."""

SCALE_BYTES = 4
"""A rank row of int8 begins with the float32 that its values are multiplied by."""


def scale_bytes(dtype: torch.dtype) -> int:
    """Bytes of a rank row before its values."""
    return SCALE_BYTES if dtype == torch.int8 else 0


def bytes_of_row(dtype: torch.dtype, width: int) -> int:
    """Bytes of a rank row of `width` values that is stored in this dtype."""
    return width * dtype.itemsize + scale_bytes(dtype)


_ITEMSIZE = np.array([dtype.itemsize for dtype in ROW_DTYPES], dtype=np.int64)
_SCALE_BYTES = np.array([scale_bytes(dtype) for dtype in ROW_DTYPES], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of one forward pass, shared by all its sites. Rows without an adapter stand in none.

    Backends work on neighbouring segments of equal length and rank together, so order segments by rank, then by length.
    """

    rows: Tensor  # [L]  int32, row of x of each entry, segment by segment
    row_start: Tensor  # [S + 1]  int32, segment s owns entries row_start[s]:row_start[s + 1]
    weight: Tensor  # [L]  fp32, mixture weight of each entry
    row_dtype: Tensor  # [S]  uint8, position in ROW_DTYPES of the segment's rank rows

    def __post_init__(self) -> None:
        check_index("Segments.rows", self.rows, torch.int32)
        check_index("Segments.row_start", self.row_start, torch.int32)
        check_index("Segments.weight", self.weight, torch.float32, len(self.rows))
        check_index("Segments.row_dtype", self.row_dtype, torch.uint8, len(self.row_start) - 1)

    @cached_property
    def num_segments(self) -> int:
        return len(self.row_dtype)

    @cached_property
    def entry_start(self) -> NDArray[np.int64]:
        """row_start on the host, checked. [S + 1]"""
        starts = on_host(self.row_start)
        if (
            len(starts) == 0
            or starts[0] != 0
            or starts[-1] != len(self.rows)
            or (np.diff(starts) < 0).any()
        ):
            raise ConfigError(
                f"Segments.row_start must rise from 0 to the number of entries ({len(self.rows)}), "
                f"got {starts.tolist()}"
            )
        return starts

    @cached_property
    def num_entries(self) -> NDArray[np.int64]:
        """Entries of each segment. [S]"""
        return np.diff(self.entry_start)

    @cached_property
    def row_dtype_index(self) -> NDArray[np.int64]:
        """row_dtype on the host, checked. [S]"""
        index = on_host(self.row_dtype)
        if (index >= len(ROW_DTYPES)).any():
            raise ConfigError(
                f"Segments.row_dtype holds positions in {ROW_DTYPES}, so less than {len(ROW_DTYPES)}; got {index.max()}"
            )
        return index

    def row_bytes(self, width: int) -> NDArray[np.int64]:
        """Bytes of one rank row of `width` elements of each segment. [S]"""
        return width * _ITEMSIZE[self.row_dtype_index] + _SCALE_BYTES[self.row_dtype_index]

    @cached_property
    def num_rows(self) -> int:
        """How many rows x must have at least: one more than the highest that is named."""
        rows = on_host(self.rows)
        if (rows < 0).any():
            raise ConfigError(f"Segments.rows must not be negative, got {rows.min()}")
        return int(rows.max(initial=-1)) + 1

    @cached_property
    def each_row_once(self) -> bool:
        """Whether no row has two entries: no mixtures."""
        return len(self.rows) == 0 or int(np.bincount(on_host(self.rows)).max()) == 1

    @cached_property
    def num_breaks(self) -> NDArray[np.int64]:
        """How often, up to each entry, a row was not its predecessor plus one: equal counts, consecutive rows. [L]"""
        rows = on_host(self.rows)
        return np.cumsum(np.diff(rows, prepend=rows[:1]) != 1)

    def first_row(self, begin: int, end: int) -> int | None:
        """The row of entry `begin` if entries begin:end name consecutive rows, which can be viewed; else None."""
        consecutive = self.num_breaks[begin] == self.num_breaks[end - 1]
        return int(self.rows[begin]) if consecutive else None

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What a backend derived from these segments, under keys of its own."""
        return {}


@dataclass(frozen=True, eq=False)
class PlacedRows:
    """How rank rows come from an adapter's values, and where they go: row i of an image is `length[i]` values, from
    value `begin[i]` on, `stride[i]` apart (a column of lora_b is a rank row), and lies at byte `offset[i]`."""

    begin: Tensor  # [R]  int64, as all four
    stride: Tensor  # [R]
    length: Tensor  # [R]
    offset: Tensor  # [R]

    def __post_init__(self) -> None:
        for name in ("begin", "stride", "length", "offset"):
            check_index(f"PlacedRows.{name}", getattr(self, name), torch.int64, len(self.begin))

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """(the smallest number in the table, one past the last value that is read)."""
        if len(self.begin) == 0:
            return 0, 0
        lowest = min(int(column.min()) for column in (self.begin, self.stride, self.length, self.offset))
        return lowest, int((self.begin + (self.length - 1) * self.stride).max()) + 1

    def image_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that an image must have at least, of rows stored in this dtype."""
        if len(self.offset) == 0:
            return 0
        return int((self.offset + self.length * dtype.itemsize).max()) + scale_bytes(dtype)


@dataclass(frozen=True, eq=False)
class RankRows:
    """Where rank rows lie. The table covers a whole step; begin and end pick one site, or stack of sites."""

    offset: Tensor  # [R]  int64, byte offset in the pool of each rank row
    begin: Tensor  # [S]  int32, segment s uses offset[begin[s]:end[s]]
    end: Tensor  # [S]  int32, begin[s] == end[s]: the adapter does not touch this site

    def __post_init__(self) -> None:
        check_index("RankRows.offset", self.offset, torch.int64)
        check_index("RankRows.begin", self.begin, torch.int32)
        check_index("RankRows.end", self.end, torch.int32, self.begin.shape[0])

    @cached_property
    def rank(self) -> NDArray[np.int64]:
        """Rank rows of each segment. [S]"""
        begin, end = on_host(self.begin), on_host(self.end)
        bad = (begin < 0) | (end < begin) | (end > len(self.offset))
        if bad.any():
            s = int(bad.argmax())
            raise ConfigError(
                f"RankRows of segment {s}: begin {begin[s]} and end {end[s]} must satisfy "
                f"0 <= begin <= end <= {len(self.offset)}"
            )
        return end - begin

    @cached_property
    def table_index(self) -> Tensor:
        """Positions in `offset` of the rank rows of all segments, segment by segment. [sum of rank] int64"""
        first = np.cumsum(self.rank) - self.rank
        index = np.arange(self.rank.sum()) + np.repeat(on_host(self.begin) - first, self.rank)
        return torch.from_numpy(index).to(self.offset.device)

    @cached_property
    def row_offset(self) -> Tensor:
        """Byte offsets of the rank rows of all segments, segment by segment. [sum of rank] int64"""
        return self.offset.index_select(0, self.table_index)

    def check_inside(self, pool_bytes: int, row_bytes: NDArray[np.int64]) -> None:
        """Refuse a rank row that does not lie in the pool. row_bytes: [S], bytes of one rank row of each segment."""
        offset = on_host(self.row_offset)
        if len(offset) == 0 or (offset.min() >= 0 and offset.max() + row_bytes.max() <= pool_bytes):
            return
        bad = (offset < 0) | (offset + np.repeat(row_bytes, self.rank) > pool_bytes)
        if bad.any():
            r = int(bad.argmax())
            s = int(np.searchsorted(np.cumsum(self.rank), r, side="right"))
            raise ConfigError(
                f"a rank row of segment {s} lies at byte {offset[r]} and takes {row_bytes[s]} bytes, "
                f"but the pool has {pool_bytes}"
            )

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What a backend derived from these rank rows, under keys of its own."""
        return {}


@dataclass(frozen=True, eq=False)
class SiteRows:
    """One site of a stack: its rank rows, and which part of the stack's outputs and of its h is the site's."""

    columns: tuple[int, int]  # of y
    b: RankRows  # rank rows of lora_b transposed, in the table of the stack
    h_column: Tensor  # [S]  int32, where the site begins in an entry's h
    scaling: Tensor  # [S]  fp32, alpha / rank of each segment's adapter

    def __post_init__(self) -> None:
        check_index("SiteRows.h_column", self.h_column, torch.int32, len(self.b.begin))
        check_index("SiteRows.scaling", self.scaling, torch.float32, len(self.b.begin))


@dataclass(frozen=True, eq=False)
class StackRows:
    """The rank rows of N sites that share their input: one shrink serves them all, each has an expand of its own.

    A step has one of these for each stack of the model, so it is made of few tensors, all of them views.
    """

    a: RankRows  # of all sites, [sum of their ranks, D] of each segment
    columns: tuple[tuple[int, int], ...]  # of y, of each site
    b_begin: Tensor  # [N, S]  int32, RankRows.begin of each site, in the table of `a`
    b_end: Tensor  # [N, S]  int32
    h_column: Tensor  # [N, S]  int32, where the site begins in an entry's h
    scaling: Tensor  # [N, S]  fp32, alpha / rank of each segment's adapter

    def __post_init__(self) -> None:
        shape = (len(self.columns), self.a.begin.shape[0])
        for name in ("b_begin", "b_end", "h_column"):
            _check_table(f"StackRows.{name}", getattr(self, name), shape, torch.int32)
        _check_table("StackRows.scaling", self.scaling, shape, torch.float32)

    @classmethod
    def of(cls, a: RankRows, sites: Sequence[SiteRows]) -> Self:
        """Put the tables of single sites together."""
        for site in sites:
            if site.b.offset is not a.offset:
                raise ConfigError("the rank rows of a stack's sites must be in the table of the stack")
        return cls(
            a,
            tuple(site.columns for site in sites),
            torch.stack([site.b.begin for site in sites]),
            torch.stack([site.b.end for site in sites]),
            torch.stack([site.h_column for site in sites]),
            torch.stack([site.scaling for site in sites]),
        )

    @cached_property
    def sites(self) -> tuple[SiteRows, ...]:
        """Each site by itself."""
        tables = zip(self.columns, self.b_begin, self.b_end, self.h_column, self.scaling, strict=True)
        return tuple(
            SiteRows(columns, RankRows(self.a.offset, begin, end), h_column, scaling)
            for columns, begin, end, h_column, scaling in tables
        )

    def check(self, segments: Segments, pool_bytes: int, width: int) -> None:
        """Refuse rank rows that do not lie in the pool, and sites whose rank rows are not among those of the stack.

        Args:
            width: elements of a rank row of the stack, D.
        """
        _ = segments.row_dtype_index
        self.a.check_inside(pool_bytes, segments.row_bytes(width))
        for number, site in enumerate(self.sites):
            begin, end = site.columns
            site.b.check_inside(pool_bytes, segments.row_bytes(end - begin))
            first = on_host(site.h_column)
            bad = (first < 0) | (first + site.b.rank > self.a.rank)
            if bad.any():
                s = int(bad.argmax())
                raise ConfigError(
                    f"site {number} of a stack has columns {first[s]} to {first[s] + site.b.rank[s]} of h in "
                    f"segment {s}, but the stack has {self.a.rank[s]} rank rows there"
                )

    def hidden(self, segments: Segments) -> tuple[list[Tensor], Tensor]:
        """(where each site begins in h, [S] int64; from one entry to the next, [S] int32): for `lora_expand`."""
        if self.kept.get("hidden", (None,))[0] is not segments:
            begin, stride = hidden_layout(self.a, segments)
            self.kept["hidden"] = segments, [begin + site.h_column for site in self.sites], stride
        _, begins, stride = self.kept["hidden"]
        return begins, stride

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What was derived from these rank rows, under keys of whoever did."""
        return {}


@dataclass(frozen=True, eq=False)
class StepRows:
    """The rank rows of all K stacks of a model, of M sites in all, in one step. The segments are the same in all.

    Adapters that meet anew make all of this new, so it is a few whole tables, of which a stack is cut as asked for.
    """

    first_site: Sequence[int]  # [K + 1], the sites of stack k are first_site[k]:first_site[k + 1]
    offset: Tensor  # [R]  int64, as in RankRows
    a_begin: Tensor  # [K, S]  int32, RankRows of each stack's lora_a
    a_end: Tensor  # [K, S]  int32
    b_begin: Tensor  # [M, S]  int32, and of each site's lora_b
    b_end: Tensor  # [M, S]  int32
    h_column: Tensor  # [M, S]  int32, as in StackRows
    scaling: Tensor  # [M, S]  fp32

    def __post_init__(self) -> None:
        check_index("StepRows.offset", self.offset, torch.int64)
        K, M, S = len(self.first_site) - 1, self.first_site[-1], self.a_begin.shape[-1]
        for name, num_rows in (("a_begin", K), ("a_end", K), ("b_begin", M), ("b_end", M), ("h_column", M)):
            _check_table(f"StepRows.{name}", getattr(self, name), (num_rows, S), torch.int32)
        _check_table("StepRows.scaling", self.scaling, (M, S), torch.float32)

    def stack(self, number: int, columns: Sequence[tuple[int, int]]) -> StackRows:
        """One stack, whose sites have these columns of its outputs."""
        sites = slice(self.first_site[number], self.first_site[number + 1])
        return StackRows(
            RankRows(self.offset, self.a_begin[number], self.a_end[number]),
            tuple(columns),
            self.b_begin[sites],
            self.b_end[sites],
            self.h_column[sites],
            self.scaling[sites],
        )


def hidden_layout(a: RankRows, segments: Segments) -> tuple[Tensor, Tensor]:
    """Return (h_begin [S] int64, h_stride [S] int32) of what `lora_shrink` returns for these rank rows.

    The slice of one site of a stack begins as many columns later as rank rows stand before it in the stack.
    """
    size = segments.num_entries * a.rank
    device = a.offset.device
    begin = torch.from_numpy(np.cumsum(size) - size).to(device)
    return begin, torch.from_numpy(a.rank.astype(np.int32)).to(device)


def check_index(name: str, tensor: Tensor, dtype: torch.dtype, length: int | None = None) -> None:
    """Refuse an index tensor that is not contiguous, one-dimensional, of this dtype and, where given, this length."""
    right = tensor.dim() == 1 and tensor.dtype == dtype and (length is None or tensor.shape[0] == length)
    if not right or not tensor.is_contiguous():
        wanted = "[*]" if length is None else f"[{length}]"
        strides = "" if tensor.is_contiguous() else f" of strides {tensor.stride()}"
        raise ConfigError(
            f"{name} must be {wanted} {dtype}, contiguous, got {list(tensor.shape)} {tensor.dtype}{strides}"
        )


def _check_table(name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ConfigError(
            f"{name} must be {list(shape)} {dtype}, contiguous, got {list(tensor.shape)} {tensor.dtype}"
        )


def on_host(tensor: Tensor) -> NDArray[np.int64]:
    """The values of an index tensor as int64, wherever it lives."""
    return tensor.numpy(force=True).astype(np.int64, copy=False)
