"""The names of kohya's files (sd-scripts, A1111, ComfyUI): `lora_unet_<flattened path>.lora_down.weight`, `.alpha`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from manylora.errors import AdapterFormatError
from manylora.lora.components import split_site
from manylora.lora.unet_names import (
    TEXT_WORDS,
    UNET_WORDS,
    flatten,
    from_stability,
    to_stability,
    unflatten,
)

Layout = Literal["sd", "sdxl"]
"""SD 1.x and 2.x have one text encoder and diffusers' names; SDXL has two, and Stability's names."""

Part = Literal["lora_a", "lora_b", "alpha"]

PARTS: dict[str, Part] = {"lora_down.weight": "lora_a", "lora_up.weight": "lora_b", "alpha": "alpha"}

TEXT_PREFIXES = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}

PREFIXES = ("lora_unet_", *TEXT_PREFIXES)


ONLY_IN_SD = (
    "down_blocks.0.attentions.",
    "down_blocks.2.downsamplers.",
    "down_blocks.3.",
    "up_blocks.2.attentions.",
    "up_blocks.2.upsamplers.",
    "up_blocks.3.",
)
"""SDXL has three stages, and no attention in the one of the highest resolution."""


def parse_kohya(name: str) -> tuple[str, Part] | None:
    """Return the site and what of it the tensor is; None for a name that is not kohya's."""
    module, _, ending = name.partition(".")
    if ending not in PARTS:
        return None
    site = _unet_site(module) if module.startswith("lora_unet_") else _text_site(module)
    return None if site is None else (site, PARTS[ending])


def _unet_site(module: str) -> str | None:
    flat = module.removeprefix("lora_unet_")
    return from_stability(flat) or unflatten(flat, UNET_WORDS)


def _text_site(module: str) -> str | None:
    for prefix, component in TEXT_PREFIXES.items():
        if module.startswith(prefix):
            path = unflatten(module.removeprefix(prefix), TEXT_WORDS)
            return None if path is None else text_site(component, path)
    return None


def text_site(component: str, path: str) -> str:
    """The one name of a text encoder's site: transformers 5 leaves `text_model` out, all files before have it."""
    return f"{component}.text_model.{path}" if path.startswith("encoder.") else f"{component}.{path}"


def kohya_name(site: str, layout: Layout) -> str:
    """Return the name of a site in kohya's files, without the ending.

    Raises:
        AdapterFormatError: kohya's files have no name for it.
    """
    component, path = split_site(site)
    if component == "unet":
        flat = to_stability(path) if layout == "sdxl" else flatten(path)
        name = f"lora_unet_{flat}" if flat else ""
    else:
        prefixes = {"sd": {"text_encoder": "te"}, "sdxl": {"text_encoder": "te1", "text_encoder_2": "te2"}}
        name = f"lora_{prefixes[layout].get(component or '', '?')}_{flatten(path)}"
    if parse_kohya(f"{name}.alpha") != (site, "alpha"):
        raise AdapterFormatError(
            f"site '{site}' has no name in kohya's files of layout '{layout}', which are for UNets and CLIP text "
            "encoders as Stable Diffusion has them; save as 'peft'"
        )
    return name


def layout_of(sites: Collection[str]) -> Layout | None:
    """Tell from its sites which model an adapter is for; None where both have them."""
    if any(_only_in_sdxl(site) for site in sites):
        return "sdxl"
    return "sd" if any(_only_in_sd(site) for site in sites) else None


def _only_in_sdxl(site: str) -> bool:
    deeper = ".transformer_blocks." in site and ".transformer_blocks.0." not in site
    return deeper or site.startswith(("text_encoder_2.", "add_embedding.", "up_blocks.0.attentions."))


def _only_in_sd(site: str) -> bool:
    return site.startswith(ONLY_IN_SD)
