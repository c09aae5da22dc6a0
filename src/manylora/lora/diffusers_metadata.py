"""What diffusers notes beside the tensors: PEFT's config of each component, keys prefixed with the component's name.

Without it, and in older versions, diffusers takes alpha = rank. Source: `LORA_ADAPTER_METADATA_KEY` in diffusers'
loaders/lora_base.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.errors import AdapterFormatError
from manylora.lora.adapter import Adapter
from manylora.lora.components import TEXT_ENCODERS, split_site
from manylora.lora.peft_config import PeftConfig, config_for, parse_config

KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class DiffusersMetadata:
    configs: Mapping[str, PeftConfig]
    """Component to its config."""

    @property
    def base_model(self) -> str | None:
        return next((config.base_model for config in self.configs.values() if config.base_model), None)

    def scaling(self, site: str, rank: int, path: Path) -> float | None:
        """Return the scaling of a site, None where no config speaks of its component.

        Raises:
            AdapterFormatError: the config does not name the site, or gives it another rank than the weights have.
        """
        component, inside = split_site(site)
        config = self.configs.get(component or "")
        if config is None:
            return None
        # transformers 5 has no `text_model` in its encoder, so a config made there names sites without it.
        names = (inside, inside.removeprefix("text_model."))
        reasons = [config.why_not(name) for name in names]
        if all(reasons):
            raise AdapterFormatError(f"{path}: there are weights for site '{site}', but {reasons[0]}")
        name = names[reasons.index(None)]
        if config.rank(name) != rank:
            raise AdapterFormatError(
                f"{path}: the metadata (r, rank_pattern) gives site '{site}' rank {config.rank(name)}, but its "
                f"weights have {rank}"
            )
        return config.scaling(name)


def parse_metadata(noted: Mapping[str, str], path: Path) -> DiffusersMetadata:
    """Read the configs that a file holds; there may be none.

    Raises:
        AdapterFormatError: naming what is not PEFT's config, or not served.
    """
    source = f"{path}, metadata {KEY}"
    try:
        values = json.loads(noted.get(KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{source} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{source} must hold an object, got {type(values).__name__}")
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, dot, name = key.partition(".")
        # A UNet that saves itself writes no prefix.
        component, name = (component, name) if dot else ("unet", key)
        if component not in ("unet", *TEXT_ENCODERS):
            raise AdapterFormatError(f"{source}: '{key}' is of no component of Stable Diffusion")
        by_component.setdefault(component, {})[name] = value
    return DiffusersMetadata(
        {component: parse_config(config, source) for component, config in by_component.items()}
    )


def metadata_for(adapter: Adapter) -> dict[str, str]:
    """Return the metadata from which diffusers, and `parse_metadata`, get each site's scaling to the last bit.

    Raises:
        AdapterFormatError: PEFT's config cannot say one of the scalings.
    """
    by_component: dict[str, dict[str, tuple[int, float]]] = {}
    for site, pair in adapter.sites.items():
        component, inside = split_site(site)
        by_component.setdefault(str(component), {})[inside] = (pair.rank, pair.scaling)
    values = {
        f"{component}.{key}": value
        for component, sites in by_component.items()
        for key, value in _config(component, sites, adapter).items()
    }
    return {KEY: json.dumps(values, indent=2, sort_keys=True)}


def _config(component: str, sites: Mapping[str, tuple[int, float]], adapter: Adapter) -> dict[str, Any]:
    if component == "unet":
        return config_for(sites, adapter.base_model, adapter.label)
    # Ends of paths, which fit with and without `text_model` before them.
    ends = {site.removeprefix("text_model."): of for site, of in sites.items()}
    config = config_for(ends, adapter.base_model, adapter.label)
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {pattern.removeprefix("^"): value for pattern, value in config[key].items()}
    return config
