"""The names of diffusers' files (pytorch_lora_weights.safetensors), of all its versions.

Now: `unet.<path>.lora_A.weight`. Before: `unet.<path>.lora.down.weight`, for text encoders
`text_encoder.<path>.lora_linear_layer.down.weight`. First: `<path to the attention>.processor.to_q_lora.down.weight`.
"""

from __future__ import annotations

import re

from manylora.errors import AdapterFormatError
from manylora.lora.components import split_site
from manylora.lora.kohya_keys import Part, text_site

HALF = re.compile(
    r"(?P<path>.+?)(?:\.lora_(?P<new>[AB])|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<old>down|up))\.weight"
)
ALPHA = re.compile(r"(?P<path>.+?)(?:\.lora|\.lora_linear_layer|_lora)?\.alpha")

HALVES: dict[str, Part] = {"A": "lora_a", "B": "lora_b", "down": "lora_a", "up": "lora_b"}

IN_TEXT_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""The first files named the projections of a text encoder as those of a UNet."""


def parse_diffusers(name: str) -> tuple[str, Part] | None:
    """Return the site and what of it the tensor is; None for a name that is not diffusers'."""
    half = HALF.fullmatch(name)
    found = half or ALPHA.fullmatch(name)
    if found is None:
        return None
    site = _site(found["path"].replace(".processor.", "."))
    return None if site is None else (site, HALVES[half["new"] or half["old"]] if half else "alpha")


def _site(path: str) -> str | None:
    component, inside = split_site(path.removeprefix("unet."))
    if component == "unet":
        return f"{inside}.0" if inside.endswith(".to_out") else inside  # to_out is [Linear, Dropout]
    if component is None or path.startswith("unet."):
        return None
    front, _, last = inside.rpartition(".")
    return text_site(component, f"{front}.{IN_TEXT_ENCODER[last]}" if last in IN_TEXT_ENCODER else inside)


def diffusers_name(site: str) -> str:
    """Return the name of a site in diffusers' files, without the ending.

    Raises:
        AdapterFormatError: diffusers' files have no name for it.
    """
    component, _ = split_site(site)
    name = f"unet.{site}" if component == "unet" else site
    if parse_diffusers(f"{name}.lora_A.weight") != (site, "lora_a"):
        raise AdapterFormatError(
            f"site '{site}' has no name in diffusers' files, whose sites begin with a UNet's "
            "(down_blocks, mid_block, up_blocks, ...) or with 'text_encoder.' or 'text_encoder_2.'; save as 'peft'"
        )
    return name
