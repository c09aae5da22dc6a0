"""The page pool. Hands out integers and counts their holders; knows no bytes, requests, adapters."""

from collections.abc import Callable, Iterable
from typing import NewType

from manylora.errors import CapacityError

PageId = NewType("PageId", int)

RefsChanged = Callable[[PageId, int], None]
"""Called as (page, refs) after a watched page has gained or lost a holder."""


class PagePool:
    """A fixed number of pages, each free or held by one or more holders.

    The free list is a stack: the page freed last is handed out first, while it may still be in the
    processor's cache. Every operation is O(1) a page. Freeing a page more often than it was held is our
    own bug: an assertion.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 0, f"a pool of {num_pages} pages"
        self._refs = [0] * num_pages
        self._free = [PageId(page) for page in reversed(range(num_pages))]
        self._watchers: dict[PageId, RefsChanged] = {}

    @property
    def num_pages(self) -> int:
        return len(self._refs)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def refs(self, page: PageId) -> int:
        """How many holders the page has; 0 is free."""
        return self._refs[page]

    def alloc(self, n: int) -> list[PageId]:
        """Take n free pages, with one reference each: all of them, or CapacityError and none."""
        assert n >= 0, f"alloc of {n} pages"
        if n > self.num_free:
            raise CapacityError(f"asked for {n} pages; {self.num_free} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def share(self, pages: Iterable[PageId]) -> None:
        """Add one reference to each page, which must be held already."""
        for page in pages:
            assert self._refs[page] > 0, f"page {page} is free and cannot be shared"
            self._set_refs(page, self._refs[page] + 1)

    def free(self, pages: Iterable[PageId]) -> None:
        """Drop one reference of each page; a page without references is free again."""
        for page in pages:
            assert self._refs[page] > 0, f"page {page} is freed more often than it was held"
            self._set_refs(page, self._refs[page] - 1)

    def watch(self, page: PageId, refs_changed: RefsChanged) -> None:
        """Tell refs_changed of every change of this page's references, until unwatch.

        A cache that keeps pages for later must know when it is left as their only holder, without scanning.
        """
        assert self._refs[page] > 0, f"page {page} is free and cannot be watched"
        assert page not in self._watchers, f"page {page} has a watcher already"
        self._watchers[page] = refs_changed

    def unwatch(self, page: PageId) -> None:
        del self._watchers[page]

    def _set_refs(self, page: PageId, refs: int) -> None:
        self._refs[page] = refs
        if refs == 0:
            self._free.append(page)
        watcher = self._watchers.get(page)
        if watcher is not None:
            watcher(page, refs)

    def check_integrity(self) -> None:
        """Assert that a page is on the free list exactly once if it has no holder, and never otherwise."""
        assert all(refs >= 0 for refs in self._refs)
        assert len(set(self._free)) == len(self._free), "a page stands twice on the free list"
        unheld = {page for page, refs in enumerate(self._refs) if refs == 0}
        assert set(self._free) == unheld, (
            f"free list and reference counts disagree: {set(self._free) ^ unheld}"
        )
        assert not self._watchers.keys() & unheld, "a free page is watched"
