"""Adapters in pages: every rank row is found again, byte for byte, wherever its pages lie; nothing else is touched."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora.errors import CapacityError
from manylora.kernels import ROW_DTYPES
from manylora.kernels.segments import SCALE_BYTES
from manylora.lora.adapter import Adapter
from manylora.models.adapter_pages import AdapterPages, ResidentAdapter
from tests.kernels.cases import POISON
from tests.models.paged_adapters import (
    OUT_FEATURES,
    PAGE_BYTES,
    SITES,
    STACKS,
    make_adapter,
    poisoned_pool,
    some_adapters,
    stack_of,
)

NUM_PAGES = 400

FULL = make_adapter(dict.fromkeys(SITES, 5))


def write_scattered(
    pool: Tensor, adapters: list[Adapter], seed: int
) -> tuple[list[ResidentAdapter], list[int]]:
    """Each adapter to random pages of its own; returns them and all pages taken."""
    pages = AdapterPages(pool, STACKS)
    free = list(range(len(pool)))
    Random(seed).shuffle(free)
    taken: list[int] = []
    resident = []
    for adapter in adapters:
        image = pages.layout(adapter)
        ids = free[len(taken) : len(taken) + image.num_pages]
        resident.append(pages.write(image, ids))
        taken += ids
    return resident, taken


def row_at(pool: Tensor, offset: int, like: Tensor) -> Tensor:
    """The bytes at an offset of the pool as a row like another one."""
    assert offset // PAGE_BYTES == (offset + like.nbytes - 1) // PAGE_BYTES, "a row crosses a page's end"
    assert offset % like.itemsize == 0
    return pool.view(-1)[offset : offset + like.nbytes]


def check_rows(pool: Tensor, resident: ResidentAdapter, adapter: Adapter) -> int:
    """Compare every row with the adapter's bytes; returns how many there were."""
    index, offsets = resident.index, resident.row_offset.tolist()
    assert resident.identity == adapter.identity
    assert ROW_DTYPES[index.dtype_code] == adapter.dtype
    seen = 0
    for m, site in enumerate(SITES):
        begin, end = int(index.site_begin[m]), int(index.site_end[m])
        pair = adapter.sites.get(site)
        if pair is None:
            assert begin == end
            continue
        k = stack_of(site)
        assert end - begin == pair.rank
        assert index.scaling[m] == pair.scaling
        first_a = int(index.stack_begin[k] + index.site_column[m])
        assert index.stack_begin[k] <= first_a <= first_a + pair.rank <= index.stack_end[k]
        for r in range(pair.rank):
            for row, want in ((first_a + r, pair.lora_a[r]), (begin + r, pair.lora_b[:, r].contiguous())):
                assert torch.equal(row_at(pool, offsets[row], want), want.view(torch.uint8))
                seen += 1
    assert seen == len(offsets)
    for k, stack in enumerate(STACKS):
        rank = sum(adapter.sites[site].rank for site in stack if site in adapter.sites)
        assert index.stack_end[k] - index.stack_begin[k] == rank
    return seen


def test_rows_lie_apart_on_scattered_pages() -> None:
    pool = poisoned_pool(NUM_PAGES)
    [resident], taken = write_scattered(pool, [FULL], seed=1)
    assert len(taken) > 10
    assert taken != sorted(taken)
    assert (np.diff(resident.row_offset) < 0).any()
    assert check_rows(pool, resident, FULL) == 2 * 5 * len(SITES)


@settings(deadline=None, max_examples=30)
@given(adapters=st.lists(some_adapters, min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_every_row_is_found_again(adapters: list[Adapter], seed: int) -> None:
    pool = poisoned_pool(NUM_PAGES)
    resident, _ = write_scattered(pool, adapters, seed)
    for where, adapter in zip(resident, adapters, strict=True):
        assert check_rows(pool, where, adapter) == 2 * sum(adapter.ranks.values())


@settings(deadline=None, max_examples=20)
@given(adapter=some_adapters)
def test_rows_of_eight_bits_lie_apart_and_are_the_nearest(adapter: Adapter) -> None:
    pool = poisoned_pool(NUM_PAGES)
    pages = AdapterPages(pool, STACKS, torch.int8)
    image = pages.layout(adapter)
    resident = pages.write(image, range(image.num_pages))
    index, begins = resident.index, resident.row_offset
    assert ROW_DTYPES[index.dtype_code] == torch.int8
    spans = []
    for site, pair in adapter.sites.items():
        m, k = SITES.index(site), stack_of(site)
        for r in range(pair.rank):
            first_a = int(index.stack_begin[k] + index.site_column[m])
            for row, want in (
                (first_a + r, pair.lora_a[r]),
                (int(index.site_begin[m]) + r, pair.lora_b[:, r]),
            ):
                at = int(begins[row])
                spans.append((at, at + SCALE_BYTES + len(want)))
                scale = pool.view(-1)[at : at + SCALE_BYTES].clone().view(torch.float32)
                got = pool.view(-1)[at + SCALE_BYTES : spans[-1][1]].view(torch.int8).float() * scale
                assert (got - want.float()).abs().max() <= scale * 0.501
    assert len(spans) == 2 * sum(adapter.ranks.values())
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert image.num_pages <= AdapterPages(pool, STACKS).layout(adapter).num_pages


@settings(deadline=None, max_examples=20)
@given(adapters=st.lists(some_adapters, min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_pages_of_others_are_untouched(adapters: list[Adapter], seed: int) -> None:
    pool = poisoned_pool(NUM_PAGES)
    _, taken = write_scattered(pool, adapters, seed)
    foreign = np.setdiff1d(np.arange(NUM_PAGES), taken)
    assert (pool[torch.tensor(taken)] != POISON).any(dim=1).all()
    assert (pool[torch.from_numpy(foreign)] == POISON).all()


@settings(deadline=None, max_examples=60)
@given(adapter=some_adapters)
def test_no_two_rows_overlap_or_cross_a_page(adapter: Adapter) -> None:
    image = AdapterPages(poisoned_pool(1), STACKS).layout(adapter)
    taken = np.zeros((image.num_pages, PAGE_BYTES), dtype=int)
    # In the order in which the kernels read them: the A of a stack's sites, then the B of each.
    present = [[adapter.sites[site] for site in stack if site in adapter.sites] for stack in STACKS]
    rows = [
        row
        for pairs in present
        for matrix in ([pair.lora_a for pair in pairs] + [pair.lora_b.t() for pair in pairs])
        for row in matrix
    ]
    for row, page, offset in zip(rows, image.page, image.offset, strict=True):
        assert offset + row.nbytes <= PAGE_BYTES
        taken[page, offset : offset + row.nbytes] += 1
    assert taken.max() == 1
    assert taken.any(axis=1).all(), "a page is empty"


def test_one_image_goes_to_any_pages() -> None:
    pool = poisoned_pool(NUM_PAGES)
    pages = AdapterPages(pool, STACKS)
    image = pages.layout(FULL)
    first = pages.write(image, range(image.num_pages))
    second = pages.write(image, range(NUM_PAGES - 1, NUM_PAGES - 1 - image.num_pages, -1))
    assert (first.row_offset != second.row_offset).all()
    check_rows(pool, first, FULL)
    check_rows(pool, second, FULL)


def test_a_row_longer_than_a_page_is_refused() -> None:
    longest = 4 * max(OUT_FEATURES.values())
    only_up = make_adapter({"up": 1})
    pages = AdapterPages(poisoned_pool(4, longest), STACKS)
    assert pages.layout(only_up).num_pages == 2
    tight = AdapterPages(poisoned_pool(4, longest - 4), STACKS)
    with pytest.raises(
        CapacityError, match=rf"{longest} bytes does not fit in a page of {longest - 4} bytes"
    ):
        tight.layout(only_up)
    assert tight.layout(make_adapter({"up": 1}, torch.bfloat16)).num_pages >= 1
