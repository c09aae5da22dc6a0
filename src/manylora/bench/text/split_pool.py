"""The ablation of the one pool: its pages divided once and for all, one part for KV and one for adapters.

Pages are the same, and come from the same pool; what is missing in one part cannot be had from the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from manylora.errors import CapacityError
from manylora.lora.adapter import AdapterId
from manylora.memory.unified import UnifiedMemory
from manylora.text.scheduler import Scheduler
from manylora.text.sequence import Sequence


class SplitMemory(UnifiedMemory):
    """Gives out pages of the part that is asked for: adapters' within `for_adapters`, KV's otherwise."""

    def __init__(self, num_pages: int, page_tokens: int, *, prefix_caching: bool = True) -> None:
        super().__init__(num_pages, page_tokens, prefix_caching=prefix_caching)
        self.num_adapter_pages = num_pages // 2
        self.num_kv_pages = num_pages - self.num_adapter_pages
        self._for_adapters = False

    @contextmanager
    def for_adapters(self) -> Iterator[None]:
        self._for_adapters = True
        try:
            yield
        finally:
            self._for_adapters = False

    @property
    def num_free(self) -> int:
        use = self.use
        if self._for_adapters:
            return self.num_adapter_pages - use.adapters
        return self.num_kv_pages - use.kv_in_use - use.prefix_only

    @property
    def num_evictable(self) -> int:
        if self._for_adapters:
            return self.adapters.num_evictable_pages
        return self.prefixes.num_evictable_pages

    def _evict_oldest(self) -> None:
        if self._for_adapters:
            self.adapters.evict_oldest()
        else:
            self.prefixes.evict_oldest()


class SplitScheduler(Scheduler):
    """A scheduler that says which part it asks for: adapters are placed by `_hold`, and by nothing else."""

    memory: SplitMemory

    def check_fits(self, num_tokens: int, adapter_pages: int = 0) -> None:
        needed = -(-num_tokens // self.memory.page_tokens)
        if needed > self.memory.num_kv_pages or adapter_pages > self.memory.num_adapter_pages:
            raise CapacityError(
                f"a request of up to {num_tokens} tokens needs {needed} pages and its adapters {adapter_pages}, but "
                f"KV has {self.memory.num_kv_pages} and adapters have {self.memory.num_adapter_pages}; "
                "give the pool more memory"
            )
        super().check_fits(num_tokens, adapter_pages)

    def _hold(self, sequence: Sequence, needs: dict[AdapterId, int]) -> bool:
        with self.memory.for_adapters():
            return super()._hold(sequence, needs)
