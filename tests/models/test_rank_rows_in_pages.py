"""Adapters in pages: every rank row is found again, byte for byte, on whichever pages it was put."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora.errors import CapacityError
from manylora.kernels import ROW_DTYPES
from manylora.lora.adapter import Adapter, LoraPair
from manylora.models.adapter_pages import AdapterPages, ResidentAdapter

PAGE_BYTES = 256
STACKS = (("q", "k", "v"), ("o",), ("gate", "up"))
SHAPES = {
    "q": (12, 20),
    "k": (12, 7),
    "v": (12, 7),
    "o": (20, 12),
    "gate": (12, 33),
    "up": (12, 33),
}  # (D, O)


def make(ranks: dict[str, int], dtype: torch.dtype, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    sites = {
        site: LoraPair(
            torch.randn(rank, SHAPES[site][0], generator=generator).to(dtype),
            torch.randn(SHAPES[site][1], rank, generator=generator).to(dtype),
            scaling=float(1 + i),
        )
        for i, (site, rank) in enumerate(ranks.items())
    }
    return Adapter(sites)


ADAPTERS = st.builds(
    make,
    st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, 9), min_size=1),
    st.sampled_from(ROW_DTYPES),
    st.integers(0, 99),
)


def row_at(pool: Tensor, offset: int, like: Tensor) -> Tensor:
    return pool.view(-1)[offset : offset + like.nbytes].clone().view(like.dtype)


def assert_found(pool: Tensor, resident: ResidentAdapter, adapter: Adapter) -> None:
    """Each site's rank rows are where the index and the offsets say, A in the stack's order and B by site."""
    index, offsets, site_number = resident.index, resident.row_offset, 0
    num_seen = 0
    for k, stack in enumerate(STACKS):
        for site in stack:
            begin, end = index.site_begin[site_number], index.site_end[site_number]
            pair = adapter.sites.get(site)
            assert end - begin == (pair.rank if pair else 0)
            if pair is not None:
                assert index.scaling[site_number] == pair.scaling
                first = index.stack_begin[k] + index.site_column[site_number]
                assert first + pair.rank <= index.stack_end[k]
                for r in range(pair.rank):
                    assert torch.equal(row_at(pool, offsets[first + r], pair.lora_a[r]), pair.lora_a[r])
                    assert torch.equal(
                        row_at(pool, offsets[begin + r], pair.lora_b[:, r]), pair.lora_b[:, r]
                    )
                num_seen += 2 * pair.rank
            site_number += 1
    assert num_seen == len(offsets)
    assert ROW_DTYPES[index.dtype_code] == adapter.dtype


@settings(deadline=None, max_examples=60)
@given(st.lists(ADAPTERS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_every_rank_row_is_found_again_on_scattered_pages(adapters, chance):
    pages = AdapterPages(torch.full((100, PAGE_BYTES), 0xFF, dtype=torch.uint8), STACKS)
    images = [pages.layout(adapter) for adapter in adapters]
    free = list(range(100))
    chance.shuffle(free)
    given_pages = [[free.pop() for _ in range(image.num_pages)] for image in images]
    residents = [pages.write(image, ids) for image, ids in zip(images, given_pages, strict=True)]
    for adapter, resident in zip(adapters, residents, strict=True):
        assert resident.identity == adapter.identity
        assert_found(pages.pages, resident, adapter)
    assert (pages.pages[free] == 0xFF).all(), "a page was written that nobody was given"


@settings(deadline=None, max_examples=60)
@given(ADAPTERS)
def test_no_two_rank_rows_overlap_or_cross_a_page(adapter):
    image = AdapterPages(torch.zeros((1, PAGE_BYTES), dtype=torch.uint8), STACKS).layout(adapter)
    taken = np.zeros((image.num_pages, PAGE_BYTES), dtype=int)
    rows = [
        row
        for stack in STACKS
        for part in ("lora_a", "lora_b")
        for site in stack
        if site in adapter.sites
        for row in (adapter.sites[site].lora_a if part == "lora_a" else adapter.sites[site].lora_b.t())
    ]
    for row, page, offset in zip(rows, image.page, image.offset, strict=True):
        assert offset + row.nbytes <= PAGE_BYTES
        taken[page, offset : offset + row.nbytes] += 1
    assert taken.max() == 1
    assert taken.any(axis=1).all(), "a page is empty"


def test_an_image_is_laid_out_once_and_written_anywhere():
    adapter = make({"q": 3, "up": 2}, torch.bfloat16)
    pages = AdapterPages(torch.zeros((40, PAGE_BYTES), dtype=torch.uint8), STACKS)
    image = pages.layout(adapter)
    first = pages.write(image, range(image.num_pages))
    second = pages.write(image, range(39, 39 - image.num_pages, -1))
    assert (first.row_offset != second.row_offset).all()
    for resident in (first, second):
        assert_found(pages.pages, resident, adapter)


def test_a_rank_row_longer_than_a_page_is_refused():
    pages = AdapterPages(torch.zeros((4, 64), dtype=torch.uint8), STACKS)
    with pytest.raises(CapacityError, match="132 bytes does not fit in a page of 64"):
        pages.layout(make({"gate": 1}, torch.float32))
