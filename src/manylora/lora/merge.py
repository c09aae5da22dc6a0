"""Merging rules that look at the single entries of deltas: TIES and DARE. Knows no adapter and no rank."""

# Shapes: O out-features, D in-features. Deltas are float64 and made one at a time: merging at a site costs a
# handful of its matrices, however many adapters take part.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

MakeDelta = Callable[[], Tensor]
"""Makes one weighted delta [O, D]."""


def ties(deltas: Sequence[MakeDelta], density: float) -> Tensor:  # [O, D]
    """Trim each delta to its largest entries, elect a sign for each entry, average what agrees with it.

    Args:
        density: the share of entries of each delta that trimming keeps, above 0 and up to 1.

    Source: TIES-Merging (Yadav et al. 2023), trimmed site by site instead of over the whole model. The vote is
    over weighted deltas: an adapter of negative weight votes for what it would add to the sum.
    """
    first, *others = deltas
    total = trim(first(), density)
    for delta in others:
        total += trim(delta(), density)
    merged, num_agreeing = torch.zeros_like(total), torch.zeros_like(total)
    for delta in deltas:
        trimmed = trim(delta(), density)
        agrees = trimmed.sign() == total.sign()
        merged += trimmed * agrees
        num_agreeing += agrees
    return merged / num_agreeing.clamp(min=1)


def dare(deltas: Mapping[str, MakeDelta], density: float, seed: int) -> Tensor:  # [O, D]
    """Keep each entry of each delta with probability `density`, divided by it; sum. The mean over seeds is the sum.

    Args:
        deltas: by a key of each, which with the seed decides what is kept, whatever the order.

    Source: DARE (Yu et al. 2024), with a plain sum.
    """
    parts = [drop(delta(), density, f"{seed}/{key}") for key, delta in deltas.items()]
    return torch.stack(parts).sum(dim=0)


def trim(delta: Tensor, density: float) -> Tensor:
    """Return `delta` with all but the largest `density` of its entries zero; entries as large as the last stay."""
    num_dropped = delta.numel() - math.ceil(density * delta.numel())
    if num_dropped == 0:
        return delta
    threshold = delta.abs().flatten().kthvalue(num_dropped + 1).values
    return delta * (delta.abs() >= threshold)


def drop(delta: Tensor, density: float, key: str) -> Tensor:
    """Return `delta` with each entry zero or divided by `density`, as coins that `key` throws have it."""
    seed = int.from_bytes(blake2b(key.encode(), digest_size=7).digest(), "little")
    coins = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed))
    return delta * (coins < density) / density
