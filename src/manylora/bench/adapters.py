"""Adapters to measure with: of the ranks asked for, all of different content, none without effect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from manylora.bench.text.contender import (
    adapter_name as adapter_name,  # workers of peers have it without torch
)
from manylora.lora.formats import save_peft
from manylora.lora.synthetic import Sites, random_adapter

STRENGTH = 0.1
"""Enough to change most greedy answers of SmolLM2: a path that drops an adapter gives other answers than a peer."""


def write_adapters(
    folder: Path, sites: Sites, count: int, ranks: Sequence[int], seed: int, *, strength: float = STRENGTH
) -> None:
    """Write `count` PEFT directories into `folder`; the ranks are dealt out in turn.

    Args:
        strength: standard deviation of what a site's output gains, for inputs of unit variance.
    """
    for number in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        rank, name = ranks[number % len(ranks)], adapter_name(number)
        save_peft(random_adapter(sites, rank, generator, strength=strength, name=name), folder / name)
