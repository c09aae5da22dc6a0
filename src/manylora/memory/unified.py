"""The one pool and those who live in it: KV of sequences, kept prefixes, adapters. Knows no tensors."""

from dataclasses import dataclass
from itertools import count

from manylora.errors import CapacityError
from manylora.memory.adapter_cache import AdapterCache
from manylora.memory.pages import PageId, PagePool
from manylora.memory.prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Who has the pages at this moment; the four add up to the pool."""

    adapters: int
    """Pages of adapters, loading, idle or in use."""
    kv_in_use: int
    """Pages that a sequence holds; one that several share counts once."""
    prefix_only: int
    """Pages that only the prefix cache holds."""
    free: int

    def in_bytes(self, page_bytes: int) -> "MemoryUse":
        """The same in bytes."""
        return MemoryUse(
            adapters=self.adapters * page_bytes,
            kv_in_use=self.kv_in_use * page_bytes,
            prefix_only=self.prefix_only * page_bytes,
            free=self.free * page_bytes,
        )


class UnifiedMemory:
    """One pool for KV and adapters; whatever has been idle longest, of either kind, makes room.

    KV pages are allocated here and freed through `pool.free`; pages allocated for an adapter go into
    `adapters`.
    """

    def __init__(self, num_pages: int, page_tokens: int, *, prefix_caching: bool = True) -> None:
        # One clock for both caches: idle times of an adapter and of a prefix page can be compared.
        clock = count().__next__
        self.page_tokens = page_tokens
        self.pool = PagePool(num_pages)
        self.adapters = AdapterCache(self.pool, clock)
        self.prefixes = PrefixCache(self.pool, page_tokens, clock, enabled=prefix_caching)

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def num_evictable(self) -> int:
        """Pages of idle adapters and idle prefixes: free as soon as somebody asks."""
        return self.adapters.num_evictable_pages + self.prefixes.num_evictable_pages

    @property
    def use(self) -> MemoryUse:
        pool, adapters, prefix_only = (
            self.pool,
            self.adapters.resident_pages,
            self.prefixes.num_unheld_pages,
        )
        kv_in_use = pool.num_pages - pool.num_free - adapters - prefix_only
        return MemoryUse(
            adapters=adapters, kv_in_use=kv_in_use, prefix_only=prefix_only, free=pool.num_free
        )

    def can_alloc(self, n: int) -> bool:
        return n <= self.num_free + self.num_evictable

    def alloc(self, n: int) -> list[PageId]:
        """Take n pages with one reference each, evicting what has been idle longest where too few are free.

        Raises:
            CapacityError: evicting everything idle would not suffice; then nothing has been evicted.
        """
        if not self.can_alloc(n):
            raise CapacityError(
                f"asked for {n} pages; of {self.pool.num_pages}, {self.num_free} are free and "
                f"{self.num_evictable} evictable (idle adapters {self.adapters.num_evictable_pages}, "
                f"idle prefixes {self.prefixes.num_evictable_pages})"
            )
        while self.num_free < n:
            self._evict_oldest()
        return self.pool.alloc(n)

    def _evict_oldest(self) -> None:
        adapter, prefix = self.adapters.oldest_idle(), self.prefixes.oldest_idle()
        if prefix is None or (adapter is not None and adapter < prefix):
            self.adapters.evict_oldest()
        else:
            self.prefixes.evict_oldest()

    def check_integrity(self) -> None:
        """Assert that pool and tenants are sound, and that their pages add up."""
        self.pool.check_integrity()
        self.adapters.check_integrity()
        self.prefixes.check_integrity()
        assert self.use.kv_in_use >= 0, f"tenants claim more pages than are held: {self.use}"
