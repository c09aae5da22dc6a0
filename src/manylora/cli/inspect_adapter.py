"""One adapter for the eye: its facts as JSON, and as a table by kind of site."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.lora.adapter import Adapter
from manylora.lora.diagnose import svd_of_pair
from manylora.lora.formats import CONFIG_FILE
from manylora.lora.peft_config import PeftConfig, parse_config

Facts = dict[str, Any]


def adapter_facts(adapter: Adapter, folder: Path | None) -> Facts:
    """Return what there is to know of an adapter, site by site.

    Args:
        folder: where its config may lie; None where it came from elsewhere than a local folder.
    """
    sites: list[Facts] = []
    for site, pair in adapter.sites.items():
        delta = svd_of_pair(pair)
        sites.append(
            {
                "site": site,
                "rank": pair.rank,
                "in_features": pair.in_features,
                "out_features": pair.out_features,
                "kernel_size": pair.kernel_size,
                "scaling": pair.scaling,
                "norm": delta.frobenius,
                "spectral_norm": delta.spectral,
                "effective_rank": delta.effective_rank,
            }
        )
    return {
        "name": adapter.name,
        "identity": adapter.identity,
        "base_model": adapter.base_model,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "num_bytes": adapter.num_bytes,
        "norm": math.hypot(*(site["norm"] for site in sites)),
        "config": [] if folder is None else _config_notes(folder),
        "sites": sites,
    }


def print_adapter(facts: Facts) -> None:
    console = Console(highlight=False, soft_wrap=True)
    sites = facts["sites"]
    base_model = facts["base_model"] or "a base that its file does not name"
    console.print(f"[bold]{escape(facts['name'])}[/]  for {escape(base_model)}")
    console.print(
        f"identity {facts['identity'][:16]}..., {facts['dtype']}, {facts['num_bytes'] / 1e6:.2f} MB"
    )
    ranks = _range(site["rank"] for site in sites)
    console.print(f"{len(sites)} sites, rank {ranks}, norm of the whole delta {facts['norm']:.3g}")
    for note in facts["config"]:
        console.print(f"config: {escape(note)}")
    by_kind: dict[str, list[Facts]] = {}
    for site in sites:
        by_kind.setdefault(site["site"].rpartition(".")[2], []).append(site)
    table = Table("site", "count", "in", "out", "rank", "scaling", "norm", "effective rank")
    for kind, of in by_kind.items():
        columns = ("in_features", "out_features", "rank", "scaling", "norm", "effective_rank")
        table.add_row(
            escape(kind), str(len(of)), *(_range(site[column] for site in of) for column in columns)
        )
    console.print(table)
    if not facts["norm"]:
        console.print("[yellow]Every delta is zero: this adapter changes nothing.[/]")


def _config_notes(folder: Path) -> list[str]:
    """What the config says beside ranks and sizes, which the tensors show."""
    path = folder / CONFIG_FILE
    if not path.is_file():  # other formats have none
        return []
    return list(_notes(parse_config(json.loads(path.read_bytes()), str(path))))


def _notes(config: PeftConfig) -> Iterable[str]:
    yield f"r {config.r}, lora_alpha {config.lora_alpha:g}"
    if config.use_rslora:
        yield "rank-stabilised (use_rslora): scaling is alpha / sqrt(rank)"
    targets = config.target_modules
    if targets is not None:
        yield f"target_modules {targets if isinstance(targets, str) else ', '.join(sorted(targets))}"
    for key in (
        "rank_pattern",
        "alpha_pattern",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    ):
        value = getattr(config, key)
        if value:
            yield f"{key} {value}"


def _range(values: Iterable[float]) -> str:
    listed = list(values)
    low, high = (
        f"{value:.3g}" if isinstance(value, float) else str(value) for value in (min(listed), max(listed))
    )
    return low if low == high else f"{low} to {high}"
