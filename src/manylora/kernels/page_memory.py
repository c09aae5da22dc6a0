"""Memory for a pool of pages."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def page_memory(num_pages: int, page_bytes: int, device: torch.device | str = "cpu") -> Tensor:
    """Return [num_pages, page_bytes] uint8 of any content.

    On a CPU with Linux it lies in the system's huge pages, where there are such: kernels go from one place of the pool
    to another, and the processor finds its way in 2 MiB where it would in 4 KiB.
    """
    num_bytes = num_pages * page_bytes
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if torch.device(device).type != "cpu" or advice is None or num_bytes == 0:
        return torch.empty(num_pages, page_bytes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:
        pass  # a kernel without huge pages: ordinary ones will do
    return torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, page_bytes)
