"""Adapters to measure with: random, all of different content, none without effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.formats import save_peft


def adapter_name(number: int) -> str:
    """The name of adapter `number` in the library and the name of its folder; PEFT accepts it too."""
    return f"adapter-{number:05d}"


def random_adapter(
    sites: Mapping[str, tuple[int, int]], rank: int, seed: int, number: int = 0, *, strength: float = 0.05
) -> Adapter:
    """An adapter of one rank on every site, in bfloat16.

    B is not zero: a path that drops the adapter would otherwise look right.

    Args:
        sites: site to (in-features, out-features).
        strength: standard deviation of what a site's output gains, for inputs of unit variance, whatever the rank.
            Of the order of what training adds; the hidden states stay in their range.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0.0, std, generator=generator).bfloat16()

    return Adapter(
        {
            site: LoraPair(
                normal(rank, fan_in, fan_in**-0.5), normal(fan_out, rank, strength * rank**-0.5), 1.0
            )
            for site, (fan_in, fan_out) in sites.items()
        },
        name=adapter_name(number),
    )


def write_adapters(
    folder: Path,
    sites: Mapping[str, tuple[int, int]],
    count: int,
    ranks: Sequence[int],
    seed: int,
    *,
    strength: float = 0.05,
) -> None:
    """Write `count` PEFT directories into `folder`; the ranks are dealt out in turn."""
    for number in range(count):
        rank = ranks[number % len(ranks)]
        save_peft(
            random_adapter(sites, rank, seed, number, strength=strength), folder / adapter_name(number)
        )
