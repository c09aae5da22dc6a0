"""Which adapters are resident and on which pages. Knows ids and pages; no tensors, files, requests."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from manylora.memory.pages import PageId, PagePool


@dataclass(frozen=True, slots=True)
class AdapterCacheStats:
    loads: int
    """Adapters that became ready."""
    hits: int
    """Acquisitions that found their adapter ready."""
    evictions: int
    """Idle adapters that gave up their pages to somebody else."""


@dataclass(frozen=True, slots=True)
class Resident:
    """An adapter that has pages."""

    adapter_id: str
    num_pages: int
    is_ready: bool
    is_pinned: bool
    num_users: int
    """Requests that hold it."""


@dataclass(slots=True)
class _Resident:
    pages: tuple[PageId, ...]
    ready: bool = False
    refs: int = 0
    pinned: bool = False

    @property
    def idle(self) -> bool:
        return self.ready and self.refs == 0 and not self.pinned


class AdapterCache:
    """Adapters in the pool. Each is absent, loading (it has pages, not yet its bytes) or ready.

    A ready adapter that no request holds and nobody has pinned is idle: it stays for the next request,
    until its pages are wanted. Idle adapters are evicted in the order in which they became idle. All
    operations are O(1), but for the pages that return to the pool. Only `pages`, `is_ready` and `is_pinned` may ask
    for an absent adapter.
    """

    def __init__(self, pool: PagePool, clock: Callable[[], int]) -> None:
        """clock never goes back; all who compete for the pages of pool share it."""
        self._pool = pool
        self._clock = clock
        self._resident: dict[str, _Resident] = {}
        self._idle: OrderedDict[str, int] = OrderedDict()  # id -> tick since which it is idle, oldest first
        self._num_evictable_pages = 0
        self._resident_pages = 0
        self._num_pinned_pages = 0
        self._residency = 0
        self._loads = self._hits = self._evictions = 0

    @property
    def num_evictable_pages(self) -> int:
        return self._num_evictable_pages

    @property
    def resident_pages(self) -> int:
        """Pages held by adapters, loading ones included."""
        return self._resident_pages

    @property
    def num_resident(self) -> int:
        """Adapters that have pages, loading ones included."""
        return len(self._resident)

    @property
    def num_pinned_pages(self) -> int:
        """Pages that stay until `unpin`, whoever asks for them."""
        return self._num_pinned_pages

    @property
    def residency(self) -> int:
        """Grows whenever an adapter comes or goes: as long as it is the same, so are those that have pages."""
        return self._residency

    @property
    def stats(self) -> AdapterCacheStats:
        return AdapterCacheStats(loads=self._loads, hits=self._hits, evictions=self._evictions)

    def pages(self, adapter_id: str) -> tuple[PageId, ...] | None:
        """Its pages in the order of its placement, or None if it is absent. Does not count as use."""
        resident = self._resident.get(adapter_id)
        return None if resident is None else resident.pages

    def is_ready(self, adapter_id: str) -> bool:
        """Whether its bytes stand on its pages; False while it is loading or absent."""
        resident = self._resident.get(adapter_id)
        return resident is not None and resident.ready

    def is_pinned(self, adapter_id: str) -> bool:
        """Whether it stays until `unpin`; False if it is absent."""
        resident = self._resident.get(adapter_id)
        return resident is not None and resident.pinned

    def residents(self) -> list[Resident]:
        """Every adapter that has pages, in the order in which they came. Any thread may ask."""
        # `copy` is one operation of the interpreter: no other thread changes the dict meanwhile.
        return [
            Resident(adapter_id, len(one.pages), one.ready, one.pinned, one.refs)
            for adapter_id, one in self._resident.copy().items()
        ]

    def insert(self, adapter_id: str, pages: Iterable[PageId]) -> None:
        """Absent -> loading. Takes over the pages and their references."""
        assert adapter_id not in self._resident, f"adapter {adapter_id} is resident already"
        resident = self._resident[adapter_id] = _Resident(tuple(pages))
        self._resident_pages += len(resident.pages)
        self._residency += 1

    def mark_ready(self, adapter_id: str) -> None:
        """Loading -> ready."""
        resident = self._resident[adapter_id]
        assert not resident.ready, f"adapter {adapter_id} is ready already"
        resident.ready = True
        self._loads += 1
        self._settle(adapter_id, resident)

    def drop(self, adapter_id: str) -> None:
        """Forget an adapter that no request holds: its load failed, or it is unloaded. Its pin goes too.

        Nothing may still be writing to its pages, which return to the pool.
        """
        resident = self._resident[adapter_id]
        assert resident.refs == 0, (
            f"adapter {adapter_id} is held by {resident.refs} requests and cannot be dropped"
        )
        if adapter_id in self._idle:
            self._leave_idle(adapter_id, resident)
        self._forget(adapter_id, resident)

    def acquire(self, adapter_id: str) -> None:
        """Hold an adapter, loading or ready, for a request: it stays until as many releases."""
        resident = self._resident[adapter_id]
        resident.refs += 1
        self._hits += resident.ready
        self._settle(adapter_id, resident)

    def release(self, adapter_id: str) -> None:
        resident = self._resident[adapter_id]
        assert resident.refs > 0, f"adapter {adapter_id} is released more often than acquired"
        resident.refs -= 1
        self._settle(adapter_id, resident)

    def pin(self, adapter_id: str) -> None:
        """Keep the adapter until unpin. A pin is a mark, not a count: pinning twice is pinning once."""
        resident = self._resident[adapter_id]
        self._num_pinned_pages += 0 if resident.pinned else len(resident.pages)
        resident.pinned = True
        self._settle(adapter_id, resident)

    def unpin(self, adapter_id: str) -> None:
        """Take the mark away. An adapter that nobody holds is idle from now on, not from its last use."""
        resident = self._resident[adapter_id]
        self._num_pinned_pages -= len(resident.pages) if resident.pinned else 0
        resident.pinned = False
        self._settle(adapter_id, resident)

    def oldest_idle(self) -> int | None:
        """The tick since which the longest idle adapter is idle; None if there is none."""
        return next(iter(self._idle.values()), None)

    def evict_oldest(self) -> int:
        """Forget the adapter that has been idle longest; returns how many pages it gave back."""
        assert self._idle, "no adapter is idle"
        adapter_id = next(iter(self._idle))
        resident = self._resident[adapter_id]
        self._leave_idle(adapter_id, resident)
        self._forget(adapter_id, resident)
        self._evictions += 1
        return len(resident.pages)

    def _settle(self, adapter_id: str, resident: _Resident) -> None:
        # The clock never goes back, so appending keeps the dict ordered by tick.
        if resident.idle and adapter_id not in self._idle:
            self._idle[adapter_id] = self._clock()
            self._num_evictable_pages += len(resident.pages)
        elif not resident.idle and adapter_id in self._idle:
            self._leave_idle(adapter_id, resident)

    def _leave_idle(self, adapter_id: str, resident: _Resident) -> None:
        del self._idle[adapter_id]
        self._num_evictable_pages -= len(resident.pages)

    def _forget(self, adapter_id: str, resident: _Resident) -> None:
        del self._resident[adapter_id]
        self._resident_pages -= len(resident.pages)
        self._num_pinned_pages -= len(resident.pages) if resident.pinned else 0
        self._residency += 1
        self._pool.free(resident.pages)

    def check_integrity(self) -> None:
        """Assert that the counts are those of the adapters, and that each page has one adapter alone."""
        pages = [page for resident in self._resident.values() for page in resident.pages]
        assert len(set(pages)) == len(pages), "two adapters stand on one page"
        assert all(self._pool.refs(page) == 1 for page in pages), "an adapter's page is free or shared"
        assert len(pages) == self._resident_pages
        pinned = [resident for resident in self._resident.values() if resident.pinned]
        assert sum(len(resident.pages) for resident in pinned) == self._num_pinned_pages
        idle = {adapter_id for adapter_id, resident in self._resident.items() if resident.idle}
        assert self._idle.keys() == idle, f"idle list and states disagree: {self._idle.keys() ^ idle}"
        assert (
            sum(len(self._resident[adapter_id].pages) for adapter_id in idle) == self._num_evictable_pages
        )
        ticks = list(self._idle.values())
        assert ticks == sorted(ticks), "the idle list is not in the order of its ticks"
