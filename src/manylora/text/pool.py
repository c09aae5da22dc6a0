"""The one pool of an engine: its bytes on the device, how they hold KV, and the bookkeeping of its pages."""

import torch

from manylora.errors import ConfigError
from manylora.kernels import KvLayout, page_memory
from manylora.memory.page_size import ModelShape, choose_page_tokens
from manylora.memory.pages import PageId
from manylora.memory.unified import MemoryUse, UnifiedMemory
from manylora.models.config import LlamaConfig
from manylora.models.llama import Llama
from manylora.text.config import EngineConfig, kv_dtype_name

TOUCH_BYTES = 4096
"""No system's pages are smaller."""


class Pool:
    """Pages for one model, on its device.

    Raises:
        ConfigError: the memory given does not hold one page.
    """

    def __init__(self, model: Llama, config: EngineConfig) -> None:
        dtype = kv_dtype_of(model, config.kv_cache_dtype)
        self.layout = KvLayout(
            num_layers=model.config.num_layers,
            page_tokens=config.page_tokens or page_tokens_of(model.config, dtype.itemsize),
            num_kv_heads=model.config.num_kv_heads,
            head_dim=model.config.head_dim,
            dtype=dtype,
        )
        page_bytes, self.num_pages = self.layout.page_bytes, config.pool_bytes // self.layout.page_bytes
        if self.num_pages < 1:
            raise ConfigError(
                f"pool_bytes must hold at least one page of {page_bytes} bytes, got {config.pool_bytes}"
            )
        self.pages = page_memory(self.num_pages, page_bytes, model.device)
        self.memory = UnifiedMemory(
            self.num_pages, self.layout.page_tokens, prefix_caching=config.prefix_caching
        )

    @property
    def bytes_held(self) -> MemoryUse:
        return self.memory.use.in_bytes(self.layout.page_bytes)

    def touch(self) -> None:
        """Have the system find all of the pool's memory now; else a step waits for each part that is written first.

        Before the first request only: pages lose what they hold.
        """
        self.pages.view(-1)[::TOUCH_BYTES] = 0

    def poison_free_pages(self) -> None:
        """Fill the pages that nobody holds with NaN (all bits set, in every float format)."""
        pool = self.memory.pool
        free = [page for page in range(self.num_pages) if pool.refs(PageId(page)) == 0]
        self.pages[torch.tensor(free, dtype=torch.int64, device=self.pages.device)] = 0xFF


def kv_dtype_of(model: Llama, kv_cache_dtype: str = "auto") -> torch.dtype:
    """What keys and values of this model are stored in; kv_cache_dtype as in EngineConfig."""
    name = "int8" if model.is_int8 else str(model.dtype).removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, kv_dtype_name(name, kv_cache_dtype))
    return dtype


def page_tokens_of(model: LlamaConfig, kv_itemsize: int) -> int:
    """The page size at which adapters and sequences of this model waste little."""
    return choose_page_tokens(
        ModelShape(
            name=model.name,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            intermediate_size=model.intermediate_size,
            kv_itemsize=kv_itemsize,
        )
    )
