"""A mixture of a diffusion model for the eye: norms by site, pairs of adapters, the denoiser's probe, the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.cli.generate import load_base
from manylora.cli.inspect_mixture import (
    finite,
    pair_table,
    print_verdict,
    read_texts,
    site_table,
    verdict_facts,
    weight_facts,
)
from manylora.errors import ConfigError
from manylora.lora.adapter import Adapter
from manylora.lora.diagnose import WeightDiagnosis
from manylora.lora.mixture import Mixture
from manylora.lora.names import UNFIT
from manylora.models.image_probe import DenoiserChange, ImageProbeResult
from manylora.models.image_repair import Repair
from manylora.models.verdict import Verdict

SLACK_BYTES = 4 << 20
"""More than an adapter takes in the pool beside its rank rows: a last page, and what runs are aligned by."""


@dataclass(frozen=True)
class ImageOptions:
    """What the command was told beside base and mixture."""

    captions: Path | None
    fast: tuple[str, ...]
    repair: bool
    dtype: str
    device: str


@dataclass(frozen=True)
class ImageInspection:
    """All that was found out about a mixture of a diffusion model."""

    mixture: Mixture
    """All of it; the parts of `probe` are those that are not in its reference."""

    weights: WeightDiagnosis
    probe: ImageProbeResult
    names: tuple[str, ...]
    """Of the parts."""

    verdict: Verdict
    repair: Repair | None


def is_diffusion_base(base: str) -> bool:
    """Whether a base is of pictures: a folder in diffusers' layout."""
    return (Path(base).expanduser() / "model_index.json").is_file()


def inspect_pictures(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    folders: Sequence[Path | None],
    base: str,
    options: ImageOptions,
) -> ImageInspection:
    """Diagnose a mixture on its base.

    Raises:
        ConfigError: an acceleration LoRA that the mixture does not hold.
        AdapterMismatchError: an adapter does not fit the base.
    """
    from manylora.image.adapters import DiffusionModel
    from manylora.lora.diagnose import diagnose_weights
    from manylora.lora.library import Library
    from manylora.models.attach import attach
    from manylora.models.diffusion_norms import module_norms
    from manylora.models.image_probe import PROBE_CAPTIONS, ImageProbe
    from manylora.models.image_repair import repair
    from manylora.models.image_verdict import judge_image

    captions = PROBE_CAPTIONS if options.captions is None else read_texts(options.captions)
    is_fast = _fast(adapters, folders, options.fast)
    named = _named(adapters)
    terms = list(zip((adapter.name for adapter in named), weights, strict=True))
    reference = [term for term, fast in zip(terms, is_fast, strict=True) if fast]
    parts = [term for term, fast in zip(terms, is_fast, strict=True) if not fast]
    if not parts:  # acceleration alone is judged against the base
        reference, parts = [], terms
    library = Library()
    for adapter in named:
        library.add(adapter.name, adapter)
    model = load_base(base, options.dtype, options.device)
    whole = DiffusionModel(model)
    with attach(whole, library, memory_bytes=pool_bytes(named), name=base) as lora:
        probe = ImageProbe(model, lora, reference, captions=captions)
        result = probe.result(parts)
        proposed = repair(probe, parts, result.mixture) if options.repair else None
        diagnosis = diagnose_weights(named, weights, module_norms(whole, lora.sites))
    names = Mixture(tuple(parts)).names
    return ImageInspection(
        Mixture(tuple(terms)), diagnosis, result, names, judge_image(result, names), proposed
    )


def pool_bytes(adapters: Sequence[Adapter]) -> int:
    """Return the size of a pool in which all adapters lie at once, however their rank rows fall on its pages."""
    # A page is left where the next row no longer fits: two pages in a row hold more than one page's bytes.
    return sum(2 * adapter.num_bytes + SLACK_BYTES for adapter in adapters)


def image_facts(found: ImageInspection) -> dict[str, Any]:
    """Return everything as JSON holds it; what is not finite is null."""
    facts = {
        "mixture": str(found.mixture),
        **weight_facts(found.weights),
        "probe": asdict(found.probe),
        "parts": list(found.names),
        "verdict": verdict_facts(found.verdict),
        "repair": None
        if found.repair is None
        else asdict(found.repair) | {"mixture": str(found.repair.mixture)},
    }
    cleaned: dict[str, Any] = finite(facts)
    return cleaned


def print_image(found: ImageInspection, top: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(str(found.mixture))}[/]\n")
    console.print(site_table(found.weights, top))
    if found.weights.pairs:
        console.print(pair_table(found.weights, top))
    console.print(_probe_table(found))
    print_verdict(console, found.verdict)
    if found.repair is not None:
        console.print(_proposal(found.repair))


def _probe_table(found: ImageInspection) -> Table:
    probe = found.probe
    table = Table("run", "prompt disagreement", "prompt gain", "difference", "roughness", "residual")
    table.title = f"Probe: {probe.num_rows} predictions of clean latents, against {probe.reference}"
    table.title_justify = "left"
    table.add_row("mixture", *_change_row(probe.mixture))
    if len(probe.parts) > 1:
        for name, part in zip(found.names, probe.parts, strict=True):
            table.add_row(escape(f"{name} alone"), *_change_row(part))
    return table


def _change_row(change: DenoiserChange) -> list[str]:
    figures = (
        *(change.prompt_disagreement, change.prompt_gain, change.divergence),
        *(change.roughness, change.residual),
    )
    return [f"{figure:.3f}" for figure in figures]


def _proposal(repair: Repair) -> str:
    if repair.factor == 1.0:
        return "Repair: none needed"
    how = f"every weight times {repair.factor:.2f}: {repair.mixture}"
    if repair.mends:
        return f"Repair: {escape(how)}"
    return f"Repair: none found; even {escape(how)} is not safe. Leave parts out"


def _fast(adapters: Sequence[Adapter], folders: Sequence[Path | None], named: Sequence[str]) -> list[bool]:
    """Which adapters are acceleration LoRAs."""
    unknown = set(named) - {adapter.name for adapter in adapters}
    if unknown:
        raise ConfigError(
            f"--fast {sorted(unknown)} is not in the mixture, which has {[a.name for a in adapters]}"
        )
    if named:
        return [adapter.name in named for adapter in adapters]
    return [folder is not None and _is_distilled(folder) for folder in folders]


def _is_distilled(place: Path) -> bool:
    """Whether a distillation left the adapter that lies there: a folder, or the one file in it that holds it."""
    from manylora.distill.output import RECORD
    from manylora.lora.convert import DIFFUSERS_FILE

    folder = place.parent if place.name == DIFFUSERS_FILE else place
    return (folder / RECORD).is_file()


def _named(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters under names that a library takes: a path's last part, numbered where two are alike."""
    taken: dict[str, Adapter] = {}
    for adapter in adapters:
        wanted = UNFIT.sub("_", Path(adapter.name).name.removesuffix(".safetensors")).lstrip(".") or "lora"
        name, number = wanted, 1
        while name in taken:
            number += 1
            name = f"{wanted}-{number}"
        taken[name] = replace(adapter, name=name)
    return list(taken.values())
