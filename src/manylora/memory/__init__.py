"""Bookkeeping of the one pool of pages that KV and adapters share. Integers only: no tensors, no torch.

Read in this order: pages, rank_rows, page_size, block_table, adapter_cache, prefix_cache, unified.
`waste` is a command that measures the layout.
"""

from manylora.memory.adapter_cache import AdapterCache, AdapterCacheStats, Resident
from manylora.memory.block_table import BlockTable
from manylora.memory.page_size import ModelShape, choose_page_tokens
from manylora.memory.pages import PageId, PagePool
from manylora.memory.prefix_cache import PrefixCache, PrefixCacheStats
from manylora.memory.rank_rows import Placement, place_rank_rows
from manylora.memory.unified import MemoryUse, UnifiedMemory

__all__ = [
    "PageId",
    "PagePool",
    "Placement",
    "place_rank_rows",
    "ModelShape",
    "choose_page_tokens",
    "BlockTable",
    "AdapterCache",
    "AdapterCacheStats",
    "Resident",
    "PrefixCache",
    "PrefixCacheStats",
    "MemoryUse",
    "UnifiedMemory",
]
