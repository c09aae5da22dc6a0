"""From the mixture of each item in a batch to what the kernels read: segments, and the rank rows of each site.

An item is whatever names one mixture: a sequence of a text batch with its new tokens, an image with its patches.
Its rows of the activations follow one another.

Letters: S segments (one resident adapter each), L entries (row, adapter), K stacks of the model, M its sites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manylora.kernels import Segments, StackRows, StepRows, ops
from manylora.kernels.native.decoder import DecoderWeights, StepLora
from manylora.lora.adapter import AdapterId
from manylora.models.adapter_pages import ResidentAdapter

WeightedAdapters = tuple[tuple[AdapterId, float], ...]
"""(adapter identity, weight) of one item; empty for the base."""

Columns = Sequence[tuple[int, int]]
"""begin:end of the outputs of a stack, of each of its sites."""

RowRange = tuple[int, int, float]
"""Rows begin:end that use an adapter, and its weight for them."""


@dataclass(frozen=True, slots=True)
class Item:
    """Rows begin:end of the activations, all with one mixture."""

    begin: int
    end: int
    mixture: WeightedAdapters


class AdapterSet:
    """The tables of the adapters that meet in one batch, side by side, so that building them is not per step.

    Depends on which adapters meet and in which order, not on which rows use them.
    """

    def __init__(
        self, adapters: Sequence[ResidentAdapter], first_site: Sequence[int], device: torch.device
    ) -> None:
        """
        Args:
            adapters: one per segment, in order.
            first_site: [K + 1], the sites of stack k are first_site[k]:first_site[k + 1].
        """
        # Kept, so that no adapter made later can be taken for one of these.
        self.adapters = tuple(adapters)
        index = [adapter.index for adapter in adapters]
        sizes = np.array([len(adapter.row_offset) for adapter in adapters], dtype=np.int64)
        first_row = np.cumsum(sizes) - sizes  # of each adapter in the joint table

        def table(
            values: list[npt.NDArray[Any]], dtype: type, added: npt.NDArray[np.int64] | int = 0
        ) -> Tensor:
            """[*, S] on the device, from a row for each adapter."""
            return torch.from_numpy((np.stack(values, axis=1) + added).astype(dtype)).to(device)

        self.row_dtype = np.array([i.dtype_code for i in index], dtype=np.uint8)  # [S]
        self.stack_rank = np.stack([i.stack_end - i.stack_begin for i in index])  # [S, K]
        self.site_rank = np.stack([i.site_end - i.site_begin for i in index])  # [S, M]
        self.touches = [bool(ranks.any()) for ranks in self.stack_rank.T]  # [K]
        self.rows = StepRows(
            first_site,
            offset=torch.from_numpy(np.concatenate([a.row_offset for a in adapters])).to(device),
            a_begin=table([i.stack_begin for i in index], np.int32, first_row),
            a_end=table([i.stack_end for i in index], np.int32, first_row),
            b_begin=table([i.site_begin for i in index], np.int32, first_row),
            b_end=table([i.site_end for i in index], np.int32, first_row),
            h_column=table([i.site_column for i in index], np.int32),
            scaling=table([i.scaling for i in index], np.float32),
        )
        self._stacks: dict[int, StackRows] = {}

    def stack(self, stack: int, columns: Columns) -> StackRows | None:
        """What the kernels read of a stack whose sites have these columns; None: no adapter touches it."""
        if stack not in self._stacks and self.touches[stack]:
            self._stacks[stack] = self.rows.stack(stack, columns)
        return self._stacks.get(stack)


class LoraBatch:
    """The LoRA of one forward pass. `apply` adds every row's own mixture to the products of one stack."""

    def __init__(self, pages: Tensor, adapters: AdapterSet, segments: Segments) -> None:
        """
        Args:
            pages: [num_pages, page_bytes] uint8, the pool.
            adapters: the tables of the segments' adapters.
            segments: which rows use which adapter.
        """
        self._pages = pages
        self._adapters = adapters
        self._segments = segments
        self._for_decoder: tuple[DecoderWeights, StepLora] | None = None

    @property
    def adapters(self) -> AdapterSet:
        return self._adapters

    @property
    def segments(self) -> Segments:
        return self._segments

    def apply(self, stack: int, x: Tensor, y: Tensor, columns: Columns) -> None:
        """Add the mixture of each row to the outputs of a stack, in place.

        Args:
            stack: which stack.
            x: [T, D], the input that its sites share.
            y: [T, O], the outputs of its sites side by side.
            columns: of y, of each site in order; the same whenever the stack is named.
        """
        rows = self._adapters.stack(stack, columns)
        if rows is not None:
            ops.add_lora(y, x, self._pages, rows, self._segments)

    def for_decoder(self, weights: DecoderWeights) -> StepLora:
        """What a call for all layers of the model reads; made once for all steps of this batch.

        Raises:
            ConfigError: the batch is not one of this model.
        """
        if self._for_decoder is None or self._for_decoder[0] is not weights:
            step = StepLora(weights, self._pages, self._adapters.rows, self._segments)
            self._for_decoder = weights, step
        return self._for_decoder[1]

    def touches(self, stack: int) -> bool:
        """Whether any adapter of the batch has a site in this stack."""
        return self._adapters.touches[stack]


class LoraBatchBuilder:
    """Builds the batch of a step, and keeps what the next step is likely to need again.

    While requests decode, the same adapters meet step after step and mostly with the same rows: then the joint
    tables, or the whole batch, are used again.
    """

    def __init__(self, pages: Tensor, stacks: Sequence[Sequence[str]]) -> None:
        self._pages = pages
        self._first_site = [0, *accumulate(len(stack) for stack in stacks)]
        self._adapters: AdapterSet | None = None
        self._batch: LoraBatch | None = None
        self._ranges: list[list[RowRange]] = []

    def build(
        self, items: Sequence[Item], resident: Mapping[AdapterId, ResidentAdapter]
    ) -> LoraBatch | None:
        """Return the batch for these items; None if all of them run the base.

        Args:
            items: in row order. Kernels are quickest when items with one adapter stand together.
            resident: the adapters that the items name, by identity.
        """
        used = self._in_order(self._used(items), resident)
        if not used:
            return None
        # Compared as objects: an adapter that was evicted and loaded again lies elsewhere.
        adapters, ranges = tuple(resident[identity] for identity, _ in used), [rows for _, rows in used]
        if self._adapters is None or self._adapters.adapters != adapters:
            self._adapters = AdapterSet(adapters, self._first_site, self._pages.device)
            self._batch = None
        if self._batch is None or self._ranges != ranges:
            segments = _segments(ranges, self._adapters.row_dtype, self._pages.device)
            self._batch = LoraBatch(self._pages, self._adapters, segments)
            self._ranges = ranges
        return self._batch

    def _used(self, items: Sequence[Item]) -> list[tuple[AdapterId, list[RowRange]]]:
        """The segments: each adapter once, with all rows that use it, so that it is read once for all of them."""
        by_adapter: dict[AdapterId, list[RowRange]] = {}
        for item in items:
            for identity, weight in item.mixture:
                by_adapter.setdefault(identity, []).append((item.begin, item.end, weight))
        return list(by_adapter.items())

    def _in_order(
        self, used: list[tuple[AdapterId, list[RowRange]]], resident: Mapping[AdapterId, ResidentAdapter]
    ) -> list[tuple[AdapterId, list[RowRange]]]:
        """Adapters of one size together, as kernels like them, and by content, so that a row of a mixture is added to
        in the same order whoever is in the batch."""
        return sorted(used, key=lambda one: (len(resident[one[0]].row_offset), one[0]))


def _segments(
    ranges_of_segment: list[list[RowRange]], row_dtype: npt.NDArray[np.uint8], device: torch.device
) -> Segments:
    """Segments from the row ranges (begin, end, weight) of each."""
    ranges = np.array([r[:2] for ranges in ranges_of_segment for r in ranges], dtype=np.int64)
    weights = np.array([r[2] for ranges in ranges_of_segment for r in ranges], dtype=np.float32)
    lengths = ranges[:, 1] - ranges[:, 0]
    starts = np.cumsum(lengths) - lengths
    rows = np.repeat(ranges[:, 0] - starts, lengths) + np.arange(lengths.sum())
    segment_of_range = np.repeat(np.arange(len(ranges_of_segment)), [len(r) for r in ranges_of_segment])
    entries = np.bincount(segment_of_range, weights=lengths, minlength=len(ranges_of_segment))
    row_start = np.concatenate([[0], np.cumsum(entries)])
    return Segments(
        rows=torch.from_numpy(rows.astype(np.int32)).to(device),
        row_start=torch.from_numpy(row_start.astype(np.int32)).to(device),
        weight=torch.from_numpy(np.repeat(weights, lengths)).to(device),
        row_dtype=torch.from_numpy(row_dtype).to(device),
    )
