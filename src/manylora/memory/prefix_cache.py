"""KV pages kept for later requests with the same beginning. Knows tokens and pages, no requests."""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from manylora.memory.pages import PageId, PagePool

# What a page of KV depends on: the page before it (for a first page: the salt) and its own tokens. A
# cached page's id stands for its whole chain of tokens, since no page is evicted before its children. The
# dict that this is the key of compares tokens in full, so two prompts whose hashes collide never share
# KV.
_Key = tuple[PageId | bytes, bytes]


@dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    hit_tokens: int
    """Tokens whose KV `match` handed out; a caller that gives the pages back and asks again counts twice."""
    evictions: int
    """Pages given up to somebody else."""


@dataclass(slots=True, eq=False)
class _Node:
    key: _Key
    page: PageId
    parent: "_Node | None"
    held: bool = True
    """Whether somebody beside the cache holds the page."""
    num_busy_children: int = 0
    """Children that are held, or that have a busy child themselves."""


class PrefixCache:
    """A forest of full KV pages. A page's parent is the page before it; each salt has trees of its own.

    A page is idle once the cache is the only holder of it and of every cached page after it. Pages become
    idle after their children, so the page that has been idle longest is always a leaf: evicting in that
    order never orphans a page. Operations are O(1) a page: a new or lost holder walks up only over pages
    whose state changes.
    """

    def __init__(
        self, pool: PagePool, page_tokens: int, clock: Callable[[], int], *, enabled: bool = True
    ) -> None:
        """clock never goes back; all who compete for the pages of pool share it.

        A cache that is not enabled keeps and finds nothing (to measure what it is worth).
        """
        assert page_tokens >= 1, f"pages of {page_tokens} tokens"
        self._pool = pool
        self._page_tokens = page_tokens
        self._clock = clock
        self.enabled = enabled
        self._nodes: dict[_Key, _Node] = {}
        self._by_page: dict[PageId, _Node] = {}
        self._idle: OrderedDict[PageId, int] = (
            OrderedDict()
        )  # page -> tick since which it is idle, oldest first
        self._num_unheld = 0
        self._hit_tokens = self._evictions = 0

    @property
    def num_pages(self) -> int:
        """Pages in the cache, held by requests or not."""
        return len(self._nodes)

    @property
    def num_unheld_pages(self) -> int:
        """Pages of which the cache is the only holder."""
        return self._num_unheld

    @property
    def num_evictable_pages(self) -> int:
        return len(self._idle)

    @property
    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(hit_tokens=self._hit_tokens, evictions=self._evictions)

    def match(self, tokens: Sequence[int], salt: bytes, *, max_tokens: int | None = None) -> list[PageId]:
        """The longest cached chain of full pages that tokens begin with; the caller holds each page.

        Never all of tokens: the last one must be computed, for the logits after it. max_tokens caps the
        chain further.

        Args:
            salt: identity of all beside the tokens that KV depends on, the mixture above all.
        """
        limit = len(tokens) - 1 if max_tokens is None else min(max_tokens, len(tokens) - 1)
        pages: list[PageId] = []
        chain: PageId | bytes = salt
        for tokens_key in self._token_keys(tokens, limit):
            node = self._nodes.get((chain, tokens_key))
            if node is None:
                break
            chain = node.page
            pages.append(node.page)
        self._pool.share(pages)
        self._hit_tokens += len(pages) * self._page_tokens
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[PageId], salt: bytes) -> None:
        """Keep the full pages of a sequence, each with one reference of the cache's own.

        Where the cache has a page for the same tokens it keeps that one, and later pages follow it.

        Args:
            tokens: those whose KV has been computed. A partly filled last page is not kept.
            pages: held by the caller, in order; at least the full pages of tokens.
        """
        if not self.enabled:
            return
        assert len(pages) >= len(tokens) // self._page_tokens, (
            f"{len(pages)} pages for {len(tokens)} tokens"
        )
        parent: _Node | None = None
        for tokens_key, page in zip(self._token_keys(tokens, len(tokens)), pages, strict=False):
            key = (salt if parent is None else parent.page, tokens_key)
            parent = self._nodes.get(key) or self._add(key, page, parent)

    def oldest_idle(self) -> int | None:
        """The tick since which the longest idle page is idle; None if there is none."""
        return next(iter(self._idle.values()), None)

    def evict_oldest(self) -> int:
        """Give up the page that has been idle longest, a leaf; returns how many pages it gave back: 1."""
        assert self._idle, "no page is idle"
        page, _ = self._idle.popitem(last=False)
        node = self._by_page.pop(page)
        del self._nodes[node.key]
        self._num_unheld -= 1
        self._evictions += 1
        self._pool.unwatch(page)
        self._pool.free([page])
        return 1

    def _token_keys(self, tokens: Sequence[int], limit: int) -> Iterator[bytes]:
        # The tokens of each full page among the first `limit`, as bytes: 4 a token, and quick to hash.
        full_pages = max(0, limit) // self._page_tokens
        packed = array("i", tokens[: full_pages * self._page_tokens])
        for begin in range(0, len(packed), self._page_tokens):
            yield packed[begin : begin + self._page_tokens].tobytes()

    def _add(self, key: _Key, page: PageId, parent: _Node | None) -> _Node:
        assert page not in self._by_page, f"page {page} is cached already, for other tokens"
        self._pool.share([page])
        self._pool.watch(page, self._refs_changed)
        node = self._nodes[key] = self._by_page[page] = _Node(key, page, parent)
        # The parent may be idle: a request that computed its own copy of it does not hold the cache's.
        if parent is not None:
            parent.num_busy_children += 1
            self._settle(parent)
        return node

    def _refs_changed(self, page: PageId, refs: int) -> None:
        assert refs > 0, f"page {page}: the cache's own reference was freed"
        node, held = self._by_page[page], refs > 1
        if node.held != held:
            node.held = held
            self._num_unheld += -1 if held else 1
            self._settle(node)

    def _settle(self, node: _Node | None) -> None:
        # A page's state depends on its own holders and its children's states, so going up stops where
        # nothing changes. Children change to idle before their parents: that keeps the idle list leaf
        # first.
        while node is not None:
            busy = node.held or node.num_busy_children > 0
            if busy == (node.page not in self._idle):
                return
            if busy:
                del self._idle[node.page]
            else:
                self._idle[node.page] = self._clock()
            if node.parent is not None:
                node.parent.num_busy_children += 1 if busy else -1
            node = node.parent

    def check_integrity(self) -> None:
        """Assert that states, counts and order follow from the pages' references and the forest."""
        assert self._nodes.keys() == {node.key for node in self._by_page.values()}
        assert self._num_unheld == sum(not node.held for node in self._nodes.values())
        busy_children = dict.fromkeys(self._by_page, 0)
        seen: set[PageId] = set()
        for page in [*self._idle, *(self._by_page.keys() - self._idle.keys())]:
            node = self._by_page[page]
            assert node.page == page
            assert node.held == (self._pool.refs(page) > 1), (
                f"page {page}: held={node.held}, {self._pool.refs(page)} refs"
            )
            seen.add(page)
            if node.parent is not None:
                assert self._by_page.get(node.parent.page) is node.parent, (
                    f"page {page} has lost its parent"
                )
                assert node.key[0] == node.parent.page
                assert page not in self._idle or node.parent.page not in seen, (
                    f"page {page} is idle after its parent"
                )
                busy_children[node.parent.page] += page not in self._idle
        for page, node in self._by_page.items():
            assert node.num_busy_children == busy_children[page]
            assert (page in self._idle) == (not node.held and node.num_busy_children == 0)
        ticks = list(self._idle.values())
        assert ticks == sorted(ticks), "the idle list is not in the order of its ticks"
