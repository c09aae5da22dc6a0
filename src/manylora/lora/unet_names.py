"""Names of a UNet's modules: with dots (diffusers), flattened (kohya), and in Stability's own layout (kohya's SDXL).

SD 1.5 and SDXL are the same three kinds of stages; Stability numbers them in one row where diffusers nests them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

UNET_ROOTS = frozenset(
    "down_blocks mid_block up_blocks conv_in conv_out time_embedding add_embedding class_embedding "
    "encoder_hid_proj".split()
)
"""First words of a UNet's module paths."""

UNET_WORDS = UNET_ROOTS | frozenset(
    "attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj "
    "proj_in proj_out conv conv1 conv2 conv_shortcut time_emb_proj linear_1 linear_2 cond_proj".split()
)

TEXT_WORDS = frozenset(
    "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection".split()
)
"""Words of the module paths of a CLIP text encoder."""

RESNETS_PER_DOWN_BLOCK = 2
"""`layers_per_block` of SD 1.5, 2.1 and SDXL. Stability's names do not tell it, so it cannot be read from a file."""

_ROW = RESNETS_PER_DOWN_BLOCK + 1
"""Numbers that one stage takes in Stability's row."""

_OUTSIDE_STAGES = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}

_IN_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}

_SITE_OUTSIDE = {flat: site for site, flat in _OUTSIDE_STAGES.items()}
_SITE_IN_RESNET = {flat: site for site, flat in _IN_RESNET.items()}
_MIDDLE = ("resnets.0", "attentions.0", "resnets.1")


def flatten(path: str) -> str:
    return path.replace(".", "_")


def unflatten(flat: str, words: Collection[str]) -> str | None:
    """Return the path that flattens to `flat` and is made of `words` and numbers; None where there is none.

    No word is two others joined, so there is one path at most.
    """
    parts = flat.split("_")
    path: list[str] = []
    while parts:
        for length in (3, 2, 1):  # the longest word has three parts
            word = "_".join(parts[:length])
            if word in words or (length == 1 and word.isdecimal()):
                path.append(word)
                del parts[:length]
                break
        else:
            return None
    return ".".join(path)


def to_stability(site: str) -> str | None:
    """Return the flattened name in Stability's layout; None for a site that the layout does not have."""
    flat = _OUTSIDE_STAGES.get(site) or _in_stage(site)
    return flat if flat and from_stability(flat) == site else None


def _in_stage(site: str) -> str | None:
    if not re.match(r"mid_block\.|(down|up)_blocks\.[0-9]{1,4}\.[a-z]+\.[0-9]{1,4}\.", site):
        return None
    match site.split("."):
        case ["mid_block", kind, number, *rest] if f"{kind}.{number}" in _MIDDLE:
            return f"middle_block_{_MIDDLE.index(f'{kind}.{number}')}_{_inside(kind, rest)}"
        case ["down_blocks", stage, "downsamplers", "0", "conv"]:
            return f"input_blocks_{(int(stage) + 1) * _ROW}_0_op"
        case ["up_blocks", stage, "upsamplers", "0", "conv"]:
            # After a resnet and an attention. SD 1.5's first stage has no attention, but is not named this way.
            return f"output_blocks_{int(stage) * _ROW + RESNETS_PER_DOWN_BLOCK}_2_conv"
        case ["down_blocks", stage, "resnets" | "attentions" as kind, number, *rest]:
            row = int(stage) * _ROW + int(number) + 1  # conv_in is number 0
            return f"input_blocks_{row}_{int(kind == 'attentions')}_{_inside(kind, rest)}"
        case ["up_blocks", stage, "resnets" | "attentions" as kind, number, *rest]:
            row = int(stage) * _ROW + int(number)
            return f"output_blocks_{row}_{int(kind == 'attentions')}_{_inside(kind, rest)}"
    return None


def _inside(kind: str, rest: list[str]) -> str:
    name = ".".join(rest)
    return _IN_RESNET.get(name, "") if kind == "resnets" else flatten(name)


def from_stability(flat: str) -> str | None:
    """Return the site of a flattened name in Stability's layout; None for a name that is not of it."""
    if flat in _SITE_OUTSIDE:
        return _SITE_OUTSIDE[flat]
    if middle := re.fullmatch(r"middle_block_([012])_(.+)", flat):
        return _path("mid_block", _MIDDLE[int(middle[1])], middle[2])
    numbered = re.fullmatch(r"(input|output)_blocks_([0-9]{1,4})_([012])_(.+)", flat)
    if numbered is None:
        return None
    row, place, rest = int(numbered[2]), int(numbered[3]), numbered[4]
    return _in_input(row, place, rest) if numbered[1] == "input" else _in_output(row, place, rest)


def _in_input(row: int, place: int, rest: str) -> str | None:
    stage, number = divmod(row - 1, _ROW)
    if row == 0 or place == 2:
        return None
    if number == RESNETS_PER_DOWN_BLOCK:
        return f"down_blocks.{stage}.downsamplers.0.conv" if (place, rest) == (0, "op") else None
    return _path(f"down_blocks.{stage}", f"{('resnets', 'attentions')[place]}.{number}", rest)


def _in_output(row: int, place: int, rest: str) -> str | None:
    stage, number = divmod(row, _ROW)
    if rest == "conv":  # last in its stage: at place 1 or 2, as there is an attention before it or not
        return (
            f"up_blocks.{stage}.upsamplers.0.conv" if place and number == RESNETS_PER_DOWN_BLOCK else None
        )
    return (
        None
        if place == 2
        else _path(f"up_blocks.{stage}", f"{('resnets', 'attentions')[place]}.{number}", rest)
    )


def _path(stage: str, member: str, rest: str) -> str | None:
    inside = (
        _SITE_IN_RESNET.get(rest)
        if member.startswith("resnets")
        else unflatten(rest, UNET_WORDS - UNET_ROOTS)
    )
    return None if inside is None else f"{stage}.{member}.{inside}"
