"""Adapters laid out in pages: which bytes go where, and the table that finds each rank row again.

Knows the stacks of a model (sites that share one input and so one shrink) and the size of a page. Knows no
requests, no residency: who may take a page is `memory`'s business.

Letters: R rank rows of one adapter, A and B rows together; K stacks of the model; M sites of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manylora.kernels import ROW_DTYPES
from manylora.lora.adapter import Adapter, AdapterId, LoraPair
from manylora.memory.rank_rows import place_rank_rows

IntArray = npt.NDArray[np.int64]


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
class ResidentAdapter:
    """An adapter in the pool: the byte offset of each of its rank rows, and what each row is for."""

    identity: AdapterId
    row_offset: IntArray  # [R]  byte offset from the start of the pool
    index: RowIndex


class AdapterPages:
    """Lays adapters out for one model and copies them into the pool's pages."""

    def __init__(self, pages: Tensor, stacks: Sequence[Sequence[str]]) -> None:
        """
        Args:
            pages: [num_pages, page_bytes] uint8, the pool, on any device.
            stacks: the sites of the model, grouped by the input they share; the order of sites in a stack is
                the order of their columns in the stacked product.
        """
        self.pages = pages
        self.stacks = tuple(tuple(stack) for stack in stacks)

    @property
    def page_bytes(self) -> int:
        return int(self.pages.shape[1])

    def layout(self, adapter: Adapter) -> AdapterImage:
        """Lay an adapter out in page-shaped host memory. Touches no shared state, so any thread may call it.

        Raises:
            CapacityError: a rank row is longer than a page.
        """
        runs, index = self._runs(adapter)
        placement = place_rank_rows([(run.shape[0], run.shape[1]) for run in runs], self.page_bytes)
        image = np.zeros((placement.num_pages, self.page_bytes), dtype=np.uint8)
        first_row = 0
        for run in runs:
            _copy_run(image, run, placement.page[first_row:], placement.offset[first_row:])
            first_row += run.shape[0]
        return AdapterImage(
            adapter.identity,
            torch.from_numpy(image),
            placement.page,
            placement.offset.astype(np.int64),
            index,
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

    def _runs(self, adapter: Adapter) -> tuple[list[npt.NDArray[np.uint8]], RowIndex]:
        """The adapter's rank rows as byte matrices [rows, row_bytes], in the order the kernels read them.

        Stack by stack: lora_a of all its sites, since one shrink reads them together, then lora_b of each.
        """
        num_sites = sum(len(stack) for stack in self.stacks)
        stack_range = np.zeros((2, len(self.stacks)), dtype=np.int64)
        site_range = np.zeros((2, num_sites), dtype=np.int64)
        column = np.zeros(num_sites, dtype=np.int64)
        scaling = np.zeros(num_sites, dtype=np.float32)
        runs: list[npt.NDArray[np.uint8]] = []
        num_rows, site = 0, 0
        for k, stack in enumerate(self.stacks):
            present = [
                (m, adapter.sites[name]) for m, name in enumerate(stack, site) if name in adapter.sites
            ]
            site += len(stack)
            stack_range[0, k] = num_rows
            for m, pair in present:
                column[m], scaling[m] = num_rows - stack_range[0, k], pair.scaling
                runs.append(_bytes_of(pair.lora_a))
                num_rows += pair.rank
            stack_range[1, k] = num_rows
            for m, pair in present:
                runs.append(_bytes_of(pair.lora_b.t()))
                site_range[:, m] = num_rows, num_rows + pair.rank
                num_rows += pair.rank
        index = RowIndex(
            stack_begin=stack_range[0],
            stack_end=stack_range[1],
            site_begin=site_range[0],
            site_end=site_range[1],
            site_column=column,
            scaling=scaling,
            dtype_code=_dtype_code(adapter),
        )
        return runs, index


def _bytes_of(rows: Tensor) -> npt.NDArray[np.uint8]:
    """[rows, n] of any dtype as [rows, n * itemsize] bytes."""
    # numpy transposes on this thread alone; see `write`.
    elements = rows.view(_INTEGER_OF_SIZE[rows.itemsize]).numpy()
    matrix: npt.NDArray[np.uint8] = np.ascontiguousarray(elements).view(np.uint8)
    return matrix


_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32}
"""numpy has no bfloat16, and bytes are all that is wanted."""


def _dtype_code(adapter: Adapter) -> int:
    pair: LoraPair = next(iter(adapter.sites.values()))
    return ROW_DTYPES.index(pair.lora_a.dtype)


def _copy_run(
    image: npt.NDArray[np.uint8], run: npt.NDArray[np.uint8], page: npt.NDArray[np.int32], offset: IntArray
) -> None:
    """Copy one run's rows to their places. Rows of a run are tight within a page, so each page is one copy."""
    row, num_rows, row_bytes = 0, run.shape[0], run.shape[1]
    while row < num_rows:
        here = page[row]
        stop = row + int(np.searchsorted(page[row:num_rows], here, side="right"))
        begin = int(offset[row])
        image[here, begin : begin + (stop - row) * row_bytes] = run[row:stop].reshape(-1)
        row = stop
