"""A mixture for the eye: norms by site, pairs of adapters, probes, and the verdict."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.errors import ConfigError
from manylora.lora.adapter import Adapter
from manylora.lora.diagnose import SiteDelta, WeightDiagnosis
from manylora.models.probe import Change, ProbeResult
from manylora.models.verdict import Level, Verdict

COLOURS = {Level.FINE: "green", Level.STRAINED: "yellow", Level.BROKEN: "red"}


@dataclass(frozen=True)
class Inspection:
    """All that was found out about a mixture. Without a base there are no probes and there is no verdict."""

    mixture: str
    weights: WeightDiagnosis
    probes: ProbeResult | None
    verdict: Verdict | None


def inspect_on_base(
    mixture: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    base: str,
    texts_file: Path | None,
    dtype: str,
    device: str,
) -> Inspection:
    from manylora.lora.diagnose import diagnose_weights
    from manylora.lora.fit import check_fits
    from manylora.models.base_norms import base_norms
    from manylora.models.loading import load_config, load_model
    from manylora.models.probe import probe
    from manylora.models.probe_texts import PROBE_TEXTS
    from manylora.models.sites import base_sites
    from manylora.models.tokenizer import load_tokenizer
    from manylora.models.verdict import judge

    texts = PROBE_TEXTS if texts_file is None else read_texts(texts_file)
    config = load_config(base)
    for adapter in adapters:  # before the weights are read
        check_fits(adapter, base_sites(config), config.name)
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=dtype, device=device)
    diagnosis = diagnose_weights(adapters, weights, base_norms(model))
    result = probe(model, [tokenizer(text)["input_ids"] for text in texts], adapters, weights)
    return Inspection(mixture, diagnosis, result, judge(result, diagnosis.names))


def mixture_facts(found: Inspection) -> dict[str, Any]:
    """Return everything as JSON holds it; what is not finite is null."""
    facts = {
        "mixture": found.mixture,
        **weight_facts(found.weights),
        "probes": None if found.probes is None else asdict(found.probes),
        "verdict": None if found.verdict is None else verdict_facts(found.verdict),
    }
    cleaned: dict[str, Any] = finite(facts)
    return cleaned


def weight_facts(weights: WeightDiagnosis) -> dict[str, Any]:
    return {
        "norm": weights.frobenius,
        "relative_norm": weights.relative,
        "sites": [
            {**asdict(site), "relative": site.relative, "relative_spectral": site.relative_spectral}
            for site in weights.sites
        ],
        "pairs": [asdict(pair) for pair in weights.pairs],
    }


def verdict_facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "level": str(verdict.level),
        "findings": [{**asdict(finding), "level": str(finding.level)} for finding in verdict.findings],
        "remarks": list(verdict.remarks),
    }


def print_mixture(found: Inspection, top: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(found.mixture)}[/]\n")
    console.print(site_table(found.weights, top))
    if found.weights.pairs:
        console.print(pair_table(found.weights, top))
    if found.probes is None or found.verdict is None:
        console.print("No verdict: what a mixture does to a model shows only on the model; give --base.")
        return
    console.print(_probe_table(found.probes, found.weights))
    print_verdict(console, found.verdict)


def print_verdict(console: Console, verdict: Verdict) -> None:
    console.print(f"Verdict: [bold {COLOURS[verdict.level]}]{verdict.level}[/]")
    for line in (*map(str, verdict.findings), *verdict.remarks):
        console.print(f"  - {escape(line)}")


def site_table(weights: WeightDiagnosis, top: int) -> Table:
    whole = "" if weights.relative is None else f" = {weights.relative:.2%} of the base's"
    title = f"Summed delta: norm {weights.frobenius:.3g}{whole}, over {len(weights.sites)} sites"
    table = Table(title=title)
    table.add_column("site", no_wrap=True)
    for column in ("norm", "of base", "spectral", "of base", "eff. rank"):
        table.add_column(column)
    for site in weights.sites[:top]:
        table.add_row(escape(site.site), *_site_row(site))
    if len(weights.sites) > top:
        table.caption = f"the {top} relatively largest of {len(weights.sites)}"
    table.title_justify = table.caption_justify = "left"
    return table


def _site_row(site: SiteDelta) -> list[str]:
    return [
        f"{site.frobenius:.3g}",
        "-" if site.relative is None else f"{site.relative:.2%}",
        f"{site.spectral:.3g}",
        "-" if site.relative_spectral is None else f"{site.relative_spectral:.2%}",
        f"{site.effective_rank:.1f}",
    ]


def pair_table(weights: WeightDiagnosis, top: int) -> Table:
    table = Table("pair", "sites", "cosine", "largest of a site", "columns", "rows")
    table.title = "Pairs: cosine of deltas; overlap of column and row spaces less that of random ones"
    for pair in weights.pairs[:top]:
        figures = (pair.cosine, pair.max_site_cosine, pair.column_overlap, pair.row_overlap)
        names = escape(f"{pair.first}, {pair.second}")
        table.add_row(names, str(pair.num_common_sites), *(f"{figure:+.3f}" for figure in figures))
    if len(weights.pairs) > top:
        table.caption = f"the {top} of largest cosine of {len(weights.pairs)}"
    table.title_justify = table.caption_justify = "left"
    return table


def _probe_table(result: ProbeResult, weights: WeightDiagnosis) -> Table:
    title = f"Probes: {result.num_positions} positions, base loss {result.base_loss:.3f} nats a token"
    table = Table("run", "KL from base", "same top token", "loss change", "perplexity", title=title)
    table.title_justify = "left"
    table.add_row("mixture", *_change_row(result.mixture))
    if len(result.parts) > 1:
        for name, weight, part in zip(weights.names, weights.weights, result.parts, strict=True):
            table.add_row(escape(f"{name}:{weight:g} alone"), *_change_row(part))
    return table


def _change_row(change: Change) -> list[str]:
    return [
        f"{change.kl:.4f}",
        f"{change.top1_agreement:.0%}",
        f"{change.loss_increase:+.3f}",
        f"x {change.perplexity_ratio:.3g}",
    ]


def read_texts(file: Path) -> list[str]:
    """Return the lines of a file of probe texts that are not empty."""
    try:
        texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the probe texts of {file}: {error}") from None
    if not texts:
        raise ConfigError(f"{file} holds no text; expected one a line")
    return texts


def finite(value: Any) -> Any:
    """Return the value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
