"""Adapters of every format: read as what they are, written as what is asked for. Knows formats, no tensor names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from manylora.errors import AdapterFormatError, ConfigError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.diffusers_keys import diffusers_name
from manylora.lora.diffusers_metadata import metadata_for
from manylora.lora.formats import load_peft, peek_peft, save_peft
from manylora.lora.header import AdapterHeader, tensors_of
from manylora.lora.kohya_keys import Layout, kohya_name, layout_of
from manylora.lora.peft_config import exact_alpha
from manylora.lora.peft_folder import CONFIG_FILE, TENSOR_FILE, readable, replace_file
from manylora.lora.single_file import KOHYA_BASE_MODEL, load_file, peek_file
from manylora.lora.tensor_file import encode_tensors

Format = Literal["peft", "diffusers", "kohya"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers names the file in a folder of its own."""


def peek_adapter(path: str | Path, name: str | None = None) -> AdapterHeader:
    """Check and return what is known of an adapter without its weights; arguments and errors as `load_adapter`."""
    with readable(path):
        file = _single_file(path)
        if file is None:
            return peek_peft(path, name)
        return peek_file(file, _name(path) if name is None else name)


def load_adapter(path: str | Path, name: str | None = None, *, validated: bool = True) -> Adapter:
    """Load an adapter of any format that is served.

    Args:
        path: PEFT's folder, diffusers' folder, or a .safetensors file of kohya or diffusers.
        name: for messages; the folder's or file's name by default.

    Raises:
        AdapterNotFoundError: there is nothing of that name.
        AdapterFormatError: it is broken or holds what is not served; a value is NaN or Inf.
        AdapterUnavailableError: it cannot be read now: no permission, a disk that fails.
    """
    with readable(path):
        file = _single_file(path)
        if file is None:
            return load_peft(path, name, validated=validated)
        return load_file(file, _name(path) if name is None else name, validated=validated)


def save_adapter(
    adapter: Adapter, path: str | Path, to: Format = "peft", *, layout: Layout | None = None
) -> None:
    """Write an adapter; loading it gives the same id.

    Args:
        path: a folder of PEFT's or diffusers' format, or the .safetensors file of kohya's or diffusers'.
        layout: of kohya's names; by default what the adapter's sites tell.

    Raises:
        AdapterFormatError: the adapter is not sound, or the format has no name for a site or no alpha for a scaling.
        ConfigError: the sites are those of several layouts, and none is given; `path` is a file where the format is a
            folder, or the other way round; PEFT's files lie in diffusers' folder.
        OSError: it cannot be written.
    """
    path = Path(path)
    if to == "peft":
        save_peft(adapter, path)
    elif to == "diffusers":
        file = path if path.suffix == ".safetensors" else _diffusers_file(path)
        adapter.validate()
        replace_file(file, encode_tensors(_diffusers_tensors(adapter), metadata_for(adapter)))
    elif to == "kohya":
        adapter.validate()
        if path.suffix != ".safetensors":
            raise ConfigError(
                f"kohya's format is one file; give a name that ends in .safetensors, not '{path}'"
            )
        noted = {KOHYA_BASE_MODEL: adapter.base_model} if adapter.base_model else {}
        replace_file(path, encode_tensors(_kohya_tensors(adapter, layout), noted))
    else:
        raise ConfigError(f"unknown format {to!r}; known: {list(get_args(Format))}")


def _single_file(path: str | Path) -> Path | None:
    """The one file that holds all of the adapter, or None: it is PEFT's, or nothing."""
    given = Path(path)
    if given.is_file() and given.name not in (CONFIG_FILE, TENSOR_FILE):
        if given.suffix != ".safetensors":
            raise AdapterFormatError(
                f"'{given}' is no .safetensors file; pickles (.pt, .ckpt, .bin) can run code and are not read"
            )
        return given
    inside = given / DIFFUSERS_FILE
    return inside if inside.is_file() and not (given / CONFIG_FILE).exists() else None


def _diffusers_file(folder: Path) -> Path:
    """The file to write in a folder, where it is what will be read.

    Raises:
        ConfigError: it is no folder, or PEFT's files in it would be read instead.
    """
    if folder.is_file():
        raise ConfigError(f"'{folder}' is a file; give a folder, or a name that ends in .safetensors")
    if (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"'{folder / CONFIG_FILE}' is in the way: PEFT's adapter would be read instead of diffusers'; give "
            "another folder, or a name that ends in .safetensors"
        )
    return folder / DIFFUSERS_FILE


def _name(path: str | Path) -> str:
    given = Path(path)
    return given.parent.name if given.name == DIFFUSERS_FILE else given.name.removesuffix(".safetensors")


def _diffusers_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for site, pair in adapter.sites.items():
        name = diffusers_name(site)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = tensors_of(pair)
    return tensors


def _kohya_tensors(adapter: Adapter, layout: Layout | None) -> dict[str, Tensor]:
    layout = layout or layout_of(adapter.sites)
    if layout is None:
        raise ConfigError(
            f"the sites of {adapter.label} are those of SD and of SDXL alike, which kohya names differently; "
            "say which it is for with layout='sd' or layout='sdxl'"
        )
    tensors = {}
    for site, pair in adapter.sites.items():
        name = kohya_name(site, layout)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = tensors_of(pair)
        tensors[f"{name}.alpha"] = _alpha(site, pair, adapter.label)
    return tensors


def _alpha(site: str, pair: LoraPair, label: str) -> Tensor:
    alpha = exact_alpha(pair.scaling, pair.rank, use_rslora=False)
    if not alpha:
        raise AdapterFormatError(
            f"{label}, site '{site}': kohya's format holds alphas that are not 0, and no alpha / {pair.rank} is "
            f"{pair.scaling!r} to the last bit"
        )
    exact = torch.tensor(alpha, dtype=torch.float64)
    single = exact.float()
    return single if single.double() == exact else exact
