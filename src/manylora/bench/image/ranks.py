"""The table `ranks`: acceleration LoRAs cut to smaller ranks by their singular values, and ones that learnt at one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from manylora.bench.image.accelerators import Accelerator
from manylora.bench.image.rows import MANY_STEPS, ImageRow, fast_row
from manylora.lora.adapter import Adapter
from manylora.lora.compose import compose
from manylora.lora.library import Library

STEPS = (4, 1)
"""Steps at which an LCM-LoRA is looked at; one distilled by phases has its own."""


def cut_name(name: str, rank: int) -> str:
    return f"{name}-cut-{rank}"


def cut_to(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter nearest to this one, site by site, of at most `rank`, in the same dtype."""
    return compose([adapter], [1.0], "svd", rank=rank, dtype=adapter.dtype).adapter


def add_cuts(library: Library, fast: Sequence[Accelerator], ranks: Sequence[int]) -> None:
    """Give the library each LoRA at each rank below its own, under `cut_name`."""
    for accelerator in fast:
        adapter = library.load(accelerator.name)
        for rank in _below(adapter, ranks):
            library.add(cut_name(accelerator.name, rank), cut_to(adapter, rank))


def ranks_table(
    guidance: float,
    library: Library,
    fast: Sequence[Accelerator],
    ranks: Sequence[int],
    retrained: Sequence[Accelerator] = (),
) -> list[ImageRow]:
    """Return the rows: the teacher, each LoRA as it is and cut, and those retrained at a small rank."""
    teacher = ImageRow(
        label=f"ddim, {MANY_STEPS} steps, guidance {guidance:g}", steps=MANY_STEPS, guidance=guidance
    )
    rows = [teacher]
    for accelerator in fast:
        adapter = library.load(accelerator.name)
        rows += _of(accelerator, accelerator.name, f"rank {max(adapter.ranks.values())}")
        for rank in _below(adapter, ranks):
            rows += _of(accelerator, cut_name(accelerator.name, rank), f"cut to rank {rank}")
    for accelerator in retrained:
        rank = max(library.load(accelerator.name).ranks.values())
        rows += _of(accelerator, accelerator.name, f"retrained at rank {rank}")
    return rows


def _of(accelerator: Accelerator, lora: str, told: str) -> Iterator[ImageRow]:
    for steps in STEPS if accelerator.sampler == "lcm" else accelerator.steps:
        yield fast_row(f"{accelerator.name}, {told}", accelerator.sampler, steps, lora)


def _below(adapter: Adapter, ranks: Sequence[int]) -> list[int]:
    return [rank for rank in ranks if rank < max(adapter.ranks.values())]
