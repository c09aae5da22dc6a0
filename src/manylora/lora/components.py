"""Adapters for several models of one pipeline: a UNet and its text encoders, in one file. Knows no format.

The UNet's sites are its module paths as they are, so that an adapter for a UNet alone is what PEFT saves of it. A text
encoder's begin with its name in the pipeline: "text_encoder.text_model.encoder.layers.0.self_attn.q_proj".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.unet_names import UNET_ROOTS

Component = Literal["unet", "text_encoder", "text_encoder_2"]

TEXT_ENCODERS: tuple[Component, ...] = ("text_encoder", "text_encoder_2")


def split_site(site: str) -> tuple[Component | None, str]:
    """Return the component of a site and its module path in it; None for a site of something else."""
    root, _, path = site.partition(".")
    for component in TEXT_ENCODERS:
        if root == component and path:
            return component, path
    return ("unet" if root in UNET_ROOTS else None), site


def components(adapter: Adapter) -> dict[Component, Adapter]:
    """Return the adapter of each component, to be attached to it; all of it is "unet" where no name says otherwise.

    transformers 5 has no `text_model` in its CLIPTextModel: there, `move_sites(of, "text_model.", "")` fits it.
    """
    sites: dict[Component, dict[str, LoraPair]] = {}
    for site, pair in adapter.sites.items():
        component, path = split_site(site)
        sites.setdefault(component or "unet", {})[path] = pair
    return {component: replace(adapter, sites=of) for component, of in sites.items()}
