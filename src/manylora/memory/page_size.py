"""How many tokens a page should hold, for a model and its adapters. Knows the shapes of models, not models.

An adapter wastes the rest of its last page and the gaps before page ends; a sequence, the rest of its
last page of KV. Small pages waste less of both, but make long block tables and short contiguous reads: so
the largest pages that waste little enough. `waste` prints what that means for some models.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manylora.errors import CapacityError
from manylora.memory.rank_rows import place_rank_rows

MAX_WASTE = 0.05
"""The share of the pages taken that an adapter of rank MIN_RANK or more on all linears may lose, and that a
sequence of SEQUENCE_TOKENS may."""

MIN_RANK = 16
SEQUENCE_TOKENS = 256
"""Prompt and answer of a short chat; longer sequences waste less."""

PAGE_TOKENS = (4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What decides the bytes of a decoder's KV and of its adapters."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    kv_itemsize: int
    """Bytes of one element of KV."""

    def plane_bytes(self, page_tokens: int) -> int:
        """Bytes of one layer's part of a page: keys and values of page_tokens tokens."""
        return page_tokens * 2 * self.num_kv_heads * self.head_dim * self.kv_itemsize

    def page_bytes(self, page_tokens: int) -> int:
        return self.num_layers * self.plane_bytes(page_tokens)


def rank_runs(
    shape: ModelShape, ranks: Iterable[int], *, mlp: bool = True, itemsize: int = 2
) -> list[tuple[int, int]]:
    """The runs (num_rows, row_bytes) of an adapter, in the order in which a forward pass reads them.

    Args:
        ranks: the rank in each layer that the adapter touches.
        mlp: whether gate, up and down are adapted beside q, k, v and o.
        itemsize: bytes of one element of the adapter.
    """
    hidden, inner = shape.hidden_size * itemsize, shape.intermediate_size * itemsize
    q = shape.num_heads * shape.head_dim * itemsize
    kv = shape.num_kv_heads * shape.head_dim * itemsize
    runs: list[tuple[int, int]] = []
    for rank in ranks:
        # The A rows of sites that read the same input stand together: they are one shrink.
        runs += [(3 * rank, hidden), (rank, q), (rank, kv), (rank, kv), (rank, q), (rank, hidden)]
        if mlp:
            runs += [(2 * rank, hidden), (rank, inner), (rank, inner), (rank, inner), (rank, hidden)]
    return runs


def adapter_waste(runs: Sequence[tuple[int, int]], page_bytes: int) -> float:
    """Share of an adapter's pages that holds no rank row."""
    used = sum(num_rows * row_bytes for num_rows, row_bytes in runs)
    return 1 - used / (place_rank_rows(runs, page_bytes).num_pages * page_bytes)


def worst_adapter_waste(shape: ModelShape, page_tokens: int, *, itemsize: int = 2) -> float:
    """The largest waste of adapters on all linears, of any rank from MIN_RANK on.

    Raises:
        CapacityError: a rank row is larger than a page.
    """
    page_bytes = shape.page_bytes(page_tokens)
    # Rounding costs less than a page whatever the rank, so the small ranks decide; a test looks further.
    return max(
        adapter_waste(rank_runs(shape, [rank] * shape.num_layers, itemsize=itemsize), page_bytes)
        for rank in range(MIN_RANK, 2 * MIN_RANK + 1)
    )


def kv_waste(page_tokens: int, sequence_tokens: int = SEQUENCE_TOKENS) -> float:
    """Share of a sequence's pages without KV: of the last, (page_tokens - 1) / 2 slots on average."""
    empty = (page_tokens - 1) / 2
    return empty / (sequence_tokens + empty)


def choose_page_tokens(
    shape: ModelShape, *, candidates: Sequence[int] = PAGE_TOKENS, itemsize: int = 2
) -> int:
    """The largest page_tokens at which neither adapters nor sequences waste more than MAX_WASTE.

    Where no candidate keeps to that, the one whose greater waste is least.

    Args:
        itemsize: bytes of one element of the adapters.
    Raises:
        CapacityError: a rank row is larger than a page of the largest candidate.
    """
    wastes: dict[int, float] = {}
    for page_tokens in sorted(candidates, reverse=True):
        try:
            waste = max(worst_adapter_waste(shape, page_tokens, itemsize=itemsize), kv_waste(page_tokens))
        except CapacityError:
            if not wastes:
                raise
            break  # smaller pages hold such a row even less
        if waste <= MAX_WASTE:
            return page_tokens
        wastes[page_tokens] = waste
    return min(wastes, key=wastes.__getitem__)
