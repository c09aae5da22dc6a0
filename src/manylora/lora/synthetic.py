"""Random adapters by the thousand, for demos and measurements: each of other content, none that breaks the model.

They are trained on nothing and teach the model nothing. What they show is the cost of having many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from manylora.errors import ConfigError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.formats import CONFIG_FILE, TENSOR_FILE, save_peft

MANIFEST = "synthetic.json"
"""Says what a folder's adapters were made from."""

RANK_EXPONENT = 1.6
"""Share of rank r is proportional to r ** -RANK_EXPONENT. Up to rank 16 the mean rank is 2.9."""

Sites = Mapping[str, tuple[int, int]]
"""Site to (in-features, out-features)."""


def synthetic_name(number: int) -> str:
    """Name and folder of adapter `number`."""
    return f"synthetic-{number:04d}"


def synthetic_adapter(
    sites: Sites, number: int, seed: int, *, max_rank: int = 16, strength: float = 0.02
) -> Adapter:
    """Return adapter `number` in bfloat16: a function of the arguments, of one rank on all sites.

    Args:
        strength: standard deviation of what a site's output gains, for inputs of unit variance, whatever the rank.
            On SmolLM2-135M, 0.02 is a delta of 0.4 % of the base weight's norm at each site and moves the next
            token's distribution by 0.001 nats (KL); 0.05 changes some greedy answers, 0.1 most.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    shares = torch.arange(1, max_rank + 1, dtype=torch.float64) ** -RANK_EXPONENT
    rank = 1 + int(torch.multinomial(shares, 1, generator=generator))
    return random_adapter(sites, rank, generator, strength=strength, name=synthetic_name(number))


def random_adapter(
    sites: Sites, rank: int, generator: torch.Generator, *, strength: float, name: str
) -> Adapter:
    """Return a random adapter of this rank on all sites, in bfloat16; strength as of `synthetic_adapter`."""
    num_values = rank * sum(fan_in + fan_out for fan_in, fan_out in sites.values())
    # One fill for the whole adapter: a call for each of the 420 tensors takes longer than the numbers themselves.
    values = torch.empty(num_values).normal_(generator=generator)
    pairs, start = {}, 0
    for site, (fan_in, fan_out) in sites.items():
        middle, end = start + rank * fan_in, start + rank * (fan_in + fan_out)
        lora_a = values[start:middle].view(rank, fan_in).mul_(1 / math.sqrt(fan_in))
        lora_b = values[middle:end].view(fan_out, rank).mul_(strength / math.sqrt(rank))
        pairs[site] = LoraPair(lora_a.bfloat16(), lora_b.bfloat16(), scaling=1.0)
        start = end
    return Adapter(pairs, name=name)


def generate_adapters(
    directory: str | Path,
    sites: Sites,
    count: int,
    seed: int = 0,
    *,
    max_rank: int = 16,
    strength: float = 0.02,
    base_model: str | None = None,
    on_written: Callable[[int], None] | None = None,
) -> list[str]:
    """Write adapters 0 .. count - 1 as PEFT directories below `directory`; returns their names.

    Each appears whole or not at all, and those that are there already are not made again, so an interrupted call
    is finished by the next. Adapter n is the same whatever `count` is.

    Args:
        on_written: told the number of adapters that are ready, after each.
    Raises:
        ConfigError: a number is out of range, or the folder holds adapters made from other arguments.
    """
    if count < 1 or max_rank < 1 or not 0 < strength < math.inf:
        raise ConfigError(
            f"count and max_rank must be at least 1 and strength positive, got {count}, {max_rank}, {strength}"
        )
    root = Path(directory).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    recipe = {
        "seed": seed,
        "max_rank": max_rank,
        "strength": strength,
        "sites": {s: list(f) for s, f in sites.items()},
    }
    _claim(root / MANIFEST, recipe)
    names = [synthetic_name(number) for number in range(count)]
    for number, name in enumerate(names):
        if not all((root / name / file).exists() for file in (CONFIG_FILE, TENSOR_FILE)):
            adapter = synthetic_adapter(sites, number, seed, max_rank=max_rank, strength=strength)
            save_peft(adapter, root / name, base_model)
        if on_written is not None:
            on_written(number + 1)
    return names


def _claim(manifest: Path, recipe: dict[str, object]) -> None:
    """Write the recipe into a new folder, or check that the folder is of the same one."""
    if not manifest.exists():
        manifest.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        found = {}
    if found != recipe:
        changed = sorted(key for key in recipe if found.get(key) != recipe[key])
        raise ConfigError(
            f"{manifest.parent} holds adapters that were made with other values of {changed}; delete the folder or "
            "choose another"
        )
