"""Rank rows in pages: none overlaps another or crosses a page's end, and all equal a slow placement."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import CapacityError
from manylora.memory import place_rank_rows
from manylora.memory.rank_rows import RUN_ALIGN_BYTES

some_runs = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 600)), max_size=12)
some_page_bytes = st.integers(600, 5000)


def place_row_by_row(runs, page_bytes):
    """The rule, one row at a time: [(page, offset)]."""
    places, page, begin = [], 0, 0
    for num_rows, row_bytes in runs:
        for row in range(num_rows):
            if row == 0:
                while begin % RUN_ALIGN_BYTES:
                    begin += 1
            if begin + row_bytes > page_bytes:
                page, begin = page + 1, 0
            places.append((page, begin))
            begin += row_bytes
    return places


@settings(deadline=None)
@given(runs=some_runs, page_bytes=some_page_bytes)
def test_equals_placing_row_by_row(runs, page_bytes):
    placement = place_rank_rows(runs, page_bytes)
    places = place_row_by_row(runs, page_bytes)
    assert list(zip(placement.page.tolist(), placement.offset.tolist(), strict=True)) == places
    assert placement.num_pages == 1 + max((page for page, _ in places), default=-1)
    assert placement.page.dtype == np.int32
    assert placement.offset.dtype == np.int64


@settings(deadline=None)
@given(runs=some_runs, page_bytes=some_page_bytes)
def test_every_byte_of_every_row_is_its_own_and_inside_its_page(runs, page_bytes):
    placement = place_rank_rows(runs, page_bytes)
    row_bytes = np.repeat([size for _, size in runs], [number for number, _ in runs])
    taken = np.zeros((placement.num_pages, page_bytes), dtype=np.int64)
    for page, offset, size in zip(placement.page, placement.offset, row_bytes, strict=True):
        assert 0 <= offset <= offset + size <= page_bytes
        taken[page, offset : offset + size] += 1
    assert taken.max(initial=0) <= 1
    assert taken.sum() == row_bytes.sum()

    first = 0
    for number, _ in runs:
        assert number == 0 or placement.offset[first] % RUN_ALIGN_BYTES == 0
        first += number


def test_a_row_may_fill_its_page():
    placement = place_rank_rows([(2, 256)], 256)
    assert placement.page.tolist() == [0, 1]
    assert placement.offset.tolist() == [0, 0]


def test_a_row_that_no_page_holds_is_refused_with_the_numbers():
    with pytest.raises(CapacityError, match="a rank row of 257 bytes does not fit in a page of 256 bytes"):
        place_rank_rows([(1, 100), (1, 257)], 256)
