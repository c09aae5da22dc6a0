"""A model that is a list of stacks, random adapters for it, and a poisoned pool."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

from manylora.kernels import FLOAT_ROW_DTYPES
from manylora.lora.adapter import Adapter, LoraPair
from tests.kernels.cases import POISON

STACKS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
SITES = tuple(site for stack in STACKS for site in stack)
IN_FEATURES = (24, 40, 24, 56)
"""Of each stack."""
OUT_FEATURES = {"q": 40, "k": 16, "v": 16, "o": 24, "gate": 56, "up": 56, "down": 24}
PAGE_BYTES = 256
"""One float32 row of the widest site, or a few of others."""


def make_adapter(ranks: Mapping[str, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    """Rank by site; sites of rank 0 are left alone. Scalings are exact in float32."""
    rng = torch.Generator().manual_seed(seed)
    pairs = {}
    for number, site in enumerate(SITES):
        rank, D = ranks.get(site, 0), IN_FEATURES[stack_of(site)]
        if rank > 0:
            lora_a = torch.randn(rank, D, generator=rng).to(dtype)
            lora_b = torch.randn(OUT_FEATURES[site], rank, generator=rng).to(dtype)
            pairs[site] = LoraPair(lora_a, lora_b, scaling=0.25 * (1 + number))
    return Adapter(pairs)


def stack_of(site: str) -> int:
    return next(k for k, stack in enumerate(STACKS) if site in stack)


some_adapters = st.builds(
    make_adapter,
    st.dictionaries(st.sampled_from(SITES), st.integers(1, 6), min_size=1),
    st.sampled_from(FLOAT_ROW_DTYPES),
    st.integers(0, 2**16),
)


def poisoned_pool(num_pages: int, page_bytes: int = PAGE_BYTES) -> Tensor:
    return torch.full((num_pages, page_bytes), POISON, dtype=torch.uint8)
