"""Memory of a pool: its shape, that it is written and read like any other, that it stays, that pages may be huge."""

import mmap

import pytest
import torch

from manylora.kernels import page_memory


@pytest.mark.parametrize("num_pages", [0, 1, 700])
def test_it_is_memory_like_any_other(num_pages):
    pages = page_memory(num_pages, 4096)
    assert (pages.shape, pages.dtype, pages.is_contiguous()) == ((num_pages, 4096), torch.uint8, True)
    pages.fill_(7)
    pages.view(-1)[::4096] = torch.arange(num_pages, dtype=torch.uint8)
    assert pages[:, 1:].eq(7).all()
    assert pages[:, 0].tolist() == [page % 256 for page in range(num_pages)]


def test_it_stays_while_a_view_of_it_does():
    view = page_memory(3, 4096).fill_(5)[1]
    assert view.eq(5).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_the_system_is_asked_for_huge_pages():
    pages = page_memory(4096, 4096)
    pages.fill_(1)
    begin = pages.data_ptr()
    with open("/proc/self/smaps") as maps:
        ours = maps.read().partition(f"{begin:x}-")[2].partition("VmFlags:")[2].partition("\n")[0]
    assert "hg" in ours.split(), "the advice was not given"
