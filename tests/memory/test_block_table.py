"""Where the KV of each token lies, and how many pages are missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.memory import BlockTable, PageId


def page_ids(*pages):
    return [PageId(page) for page in pages]


@given(page_tokens=st.integers(1, 5), num_pages=st.integers(0, 6), num_tokens=st.integers(0, 40))
def test_pages_needed_are_just_enough(page_tokens, num_pages, num_tokens):
    table = BlockTable(page_tokens, page_ids(*range(num_pages)))
    needed = table.pages_needed(num_tokens)
    table.grow(page_ids(*range(needed)))
    assert table.capacity_tokens >= num_tokens
    assert table.pages_needed(num_tokens) == 0
    assert needed == 0 or table.capacity_tokens - page_tokens < num_tokens


def test_slots_follow_the_pages_in_their_order():
    table = BlockTable(3, page_ids(7, 2))
    page, index = table.slots(1, 6)
    assert page.tolist() == [7, 7, 2, 2, 2]
    assert index.tolist() == [1, 2, 0, 1, 2]
    assert [len(part) for part in table.slots(4, 4)] == [0, 0]
    with pytest.raises(AssertionError, match=r"tokens 5\.\.7 of a table for 6"):
        table.slots(5, 7)


def test_pages_are_released_once():
    table = BlockTable(4, page_ids(3, 1))
    assert table.release() == [3, 1]
    assert table.release() == []
    assert table.capacity_tokens == 0
