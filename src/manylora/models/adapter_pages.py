"""Adapters laid out in pages: which bytes go where, and the table that finds each rank row again.

Knows the stacks of a model (sites that share one input and so one shrink) and the size of a page. Knows no
requests, no residency: who may take a page is `memory`'s business.

Letters: R rank rows of one adapter, A and B rows together; K stacks of the model; M sites of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manylora.kernels import ROW_DTYPES, PlacedRows, bytes_of_row, place_rows
from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.pairs import PairTable
from manylora.memory.rank_rows import place_rank_rows

IntArray = npt.NDArray[np.int64]

MAX_PLANS = 64
"""Ways of lying in pages that are kept; the table of one takes some 40 bytes a rank row."""


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Which rank rows belong to which stack and site, in the adapter's own order. Independent of pages."""

    stack_begin: IntArray  # [K]  lora_a rows of all sites of stack k are rows stack_begin[k]:stack_end[k]
    stack_end: IntArray  # [K]
    site_begin: IntArray  # [M]  lora_b rows of site m; begin == end where the adapter leaves the site alone
    site_end: IntArray  # [M]
    site_column: IntArray  # [M]  first column of the site in its stack's shrink
    scaling: npt.NDArray[np.float32]  # [M]
    dtype_code: int
    """Index into ROW_DTYPES of every rank row of this adapter."""


@dataclass(frozen=True, eq=False)
class AdapterImage:
    """An adapter as the bytes of its pages, in host memory, ready to be copied into any pages of the pool."""

    identity: AdapterId
    pages: Tensor  # [num_pages, page_bytes]  uint8
    page: npt.NDArray[np.int32]  # [R]  which of its pages each rank row lies in
    offset: IntArray  # [R]  byte offset in that page
    index: RowIndex

    @property
    def num_pages(self) -> int:
        return int(self.pages.shape[0])


@dataclass(frozen=True, eq=False)
class _Plan:
    """The image of every adapter with one table, but for its values."""

    num_pages: int
    page: npt.NDArray[np.int32]  # [R]
    offset: IntArray  # [R]  byte offset in that page
    rows: PlacedRows
    index: RowIndex


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """An adapter in the pool: the byte offset of each of its rank rows, and what each row is for."""

    identity: AdapterId
    row_offset: IntArray  # [R]  byte offset from the start of the pool
    index: RowIndex


class AdapterPages:
    """Lays adapters out for one model and copies them into the pool's pages."""

    def __init__(
        self, pages: Tensor, stacks: Sequence[Sequence[str]], row_dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            pages: [num_pages, page_bytes] uint8, the pool, on any device.
            stacks: the sites of the model, grouped by the input they share; the order of sites in a stack is
                the order of their columns in the stacked product.
            row_dtype: int8 rounds every rank row as it is laid out. None: as the adapter has it.
        """
        self.pages = pages
        self.row_dtype = row_dtype
        self.stacks = tuple(tuple(stack) for stack in stacks)
        # Adapters that one recipe made share their table, and then all but their values. A cache of a method would hold
        # its object, and with it the pool until the next garbage collection.
        plan_for = partial(_plan_for, self.stacks, self.page_bytes, row_dtype)
        self._plan = lru_cache(maxsize=MAX_PLANS)(plan_for)

    @property
    def page_bytes(self) -> int:
        return int(self.pages.shape[1])

    def layout(self, adapter: Adapter) -> AdapterImage:
        """Lay an adapter out in page-shaped host memory. Touches no shared state, so any thread may call it.

        Raises:
            CapacityError: a rank row is longer than a page.
        """
        packed = adapter.packed
        plan = self._plan(packed.table)
        # numpy's zeros, on this thread alone; see `write`.
        image = torch.from_numpy(np.zeros(plan.num_pages * self.page_bytes, np.uint8))
        place_rows(packed.buffer, image, plan.rows, dtype=self.row_dtype)
        return AdapterImage(
            adapter.identity,
            image.view(plan.num_pages, self.page_bytes),
            plan.page,
            plan.offset,
            plan.index,
        )

    def write(self, image: AdapterImage, page_ids: Sequence[int]) -> ResidentAdapter:
        """Copy an image into the given pages of the pool."""
        ids = np.asarray(page_ids, dtype=np.int64)
        if self.pages.device.type == "cpu":
            # By numpy, on this thread alone: torch would spread the copy over threads of its own, and the step that is
            # being computed would wait for each of its threads that was put aside for one of them.
            self.pages.numpy()[ids] = image.pages.numpy()
        else:
            self.pages[torch.from_numpy(ids).to(self.pages.device)] = image.pages.to(self.pages.device)
        return ResidentAdapter(
            image.identity, ids[image.page] * self.page_bytes + image.offset, image.index
        )


class _Run(NamedTuple):
    """Rank rows that one pair gives, side by side: what `PlacedRows` says of each."""

    begin: int
    step: int
    """From one row's first value to the next one's."""
    stride: int
    num_rows: int
    length: int


def _plan_for(
    stacks: Sequence[Sequence[str]], page_bytes: int, row_dtype: torch.dtype | None, table: PairTable
) -> _Plan:
    """Decide where the rank rows of adapters with this table lie, in the order in which the kernels read them.

    Stack by stack: lora_a of all its sites, since one shrink reads them together, then lora_b of each.
    """
    num_sites = sum(len(stack) for stack in stacks)
    stack_range = np.zeros((2, len(stacks)), dtype=np.int64)
    site_range = np.zeros((2, num_sites), dtype=np.int64)
    column = np.zeros(num_sites, dtype=np.int64)
    scaling = np.zeros(num_sites, dtype=np.float32)
    runs: list[_Run] = []
    num_rows, site = 0, 0
    for k, stack in enumerate(stacks):
        present = [
            (m, name, table.sites[name]) for m, name in enumerate(stack, site) if name in table.sites
        ]
        site += len(stack)
        stack_range[0, k] = num_rows
        for m, name, header in present:
            column[m], scaling[m] = num_rows - stack_range[0, k], header.scaling
            runs.append(_Run(table.begin[name], header.in_features, 1, header.rank, header.in_features))
            num_rows += header.rank
        stack_range[1, k] = num_rows
        for m, name, header in present:
            # Columns of lora_b [out, rank] are its rank rows.
            begin = table.begin[name] + header.rank * header.in_features
            runs.append(_Run(begin, 1, header.rank, header.rank, header.out_features))
            site_range[:, m] = num_rows, num_rows + header.rank
            num_rows += header.rank
    dtype = row_dtype or table.dtype
    placement = place_rank_rows(
        [(run.num_rows, bytes_of_row(dtype, run.length)) for run in runs], page_bytes
    )
    return _Plan(
        placement.num_pages,
        placement.page,
        placement.offset,
        _placed_rows(runs, placement.page * np.int64(page_bytes) + placement.offset),
        RowIndex(
            stack_begin=stack_range[0],
            stack_end=stack_range[1],
            site_begin=site_range[0],
            site_end=site_range[1],
            site_column=column,
            scaling=scaling,
            dtype_code=ROW_DTYPES.index(dtype),
        ),
    )


def _placed_rows(runs: Sequence[_Run], offset: IntArray) -> PlacedRows:
    begin, step, stride, num_rows, length = np.array(runs, dtype=np.int64).reshape(-1, 5).T
    nth = np.arange(num_rows.sum()) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)  # within its run
    begin, step, stride, length = (np.repeat(c, num_rows) for c in (begin, step, stride, length))
    return PlacedRows(*(torch.from_numpy(c) for c in (begin + nth * step, stride, length, offset)))
