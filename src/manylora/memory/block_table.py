"""The pages of one sequence, in order. Decides nothing: who grows it has the pages already."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from manylora.memory.pages import PageId


class BlockTable:
    """Token i of the sequence has its KV in page `pages[i // page_tokens]`, at index `i % page_tokens`."""

    def __init__(self, page_tokens: int, pages: Iterable[PageId] = ()) -> None:
        assert page_tokens >= 1, f"pages of {page_tokens} tokens"
        self.page_tokens = page_tokens
        self.pages: list[PageId] = list(pages)

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose KV the pages can hold."""
        return len(self.pages) * self.page_tokens

    def pages_needed(self, num_tokens: int) -> int:
        """Pages still missing before the table holds num_tokens in all; 0 if it does already."""
        return max(0, -(-num_tokens // self.page_tokens) - len(self.pages))

    def grow(self, pages: Iterable[PageId]) -> None:
        """Append pages, whose references now belong to the table."""
        self.pages.extend(pages)

    def slots(self, begin: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the KV of tokens begin..end-1 lies.

        Returns:
            page [end - begin] int64 and index within the page [end - begin] int64.
        """
        assert 0 <= begin <= end <= self.capacity_tokens, (
            f"tokens {begin}..{end} of a table for {self.capacity_tokens}"
        )
        token = np.arange(begin, end, dtype=np.int64)
        pages = np.asarray(self.pages, dtype=np.int64)
        return pages[token // self.page_tokens], token % self.page_tokens

    def release(self) -> list[PageId]:
        """Empty the table; its pages are the caller's to free."""
        pages, self.pages = self.pages, []
        return pages
