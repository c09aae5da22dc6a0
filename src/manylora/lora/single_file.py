"""Adapters in one .safetensors file, of kohya or of diffusers: recognised by the names of its tensors.

Every tensor is used, or refused by name. What trainers note beside the tensors is read only where it decides what the
adapter computes (diffusers' copy of PEFT's config) or names the base model.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from manylora.errors import AdapterFormatError
from manylora.lora.adapter import Adapter, widest
from manylora.lora.diffusers_keys import parse_diffusers
from manylora.lora.diffusers_metadata import DiffusersMetadata, parse_metadata
from manylora.lora.foreign_keys import what_is
from manylora.lora.header import AdapterHeader, dtype_of, pair_of, pair_sizes
from manylora.lora.kohya_keys import PREFIXES, Part, parse_kohya
from manylora.lora.pairs import SiteHeader
from manylora.lora.tensor_file import TensorInfo, decode_tensors, read_header, read_metadata, read_number

Kind = Literal["diffusers", "kohya"]

PARSERS: Mapping[Kind, Callable[[str], tuple[str, Part] | None]] = {
    "diffusers": parse_diffusers,
    "kohya": parse_kohya,
}

KOHYA_BASE_MODEL = "ss_sd_model_name"
"""The note in which kohya's trainer names the base model."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Which tensors of the file are one site's."""

    lora_a: str
    lora_b: str
    alpha: str | None


@dataclass(frozen=True)
class _Read:
    """What there is to know of a file before its weights."""

    header: AdapterHeader
    names: Mapping[str, _Names]


def peek_file(path: str | Path, name: str | None = None) -> AdapterHeader:
    """Check and return what is known of an adapter without its weights: only header and alphas are read.

    Raises:
        AdapterFormatError: as `load_file`, except that values are not seen.
    """
    path = Path(path)
    with path.open("rb") as file:
        return _read(file, path, name).header


def load_file(path: str | Path, name: str | None = None, *, validated: bool = True) -> Adapter:
    """Load an adapter. Tensors keep the dtype of the file; mixed dtypes become one that holds all exactly.

    A site without an alpha has alpha = rank, as kohya and diffusers take it.

    Args:
        path: a .safetensors file.
        name: for messages; the file's name by default.
        validated: False leaves `Adapter.validate` to the caller.

    Raises:
        AdapterFormatError: the file is broken or holds what is not served; a value is NaN or Inf.
    """
    path = Path(path)
    data = path.read_bytes()
    read = _read(io.BytesIO(data), path, name)
    header, tensors = read.header, decode_tensors(data, path)
    pairs = {
        site: pair_of(tensors[of.lora_a], tensors[of.lora_b], header.sites[site], header.dtype)
        for site, of in read.names.items()
    }
    adapter = Adapter(pairs, name=header.name, base_model=header.base_model)
    if validated:
        adapter.validate()
    return adapter


def _read(file: BinaryIO, path: Path, name: str | None) -> _Read:
    tensors = read_header(file, path)
    kind = kind_of(tensors, path)
    names = _by_site(tensors, kind, path)
    noted = read_metadata(file, path)
    told = parse_metadata(noted, path) if kind == "diffusers" else DiffusersMetadata({})
    sites = {}
    for site, of in sorted(names.items()):
        alpha = None if of.alpha is None else _alpha(file, of.alpha, tensors[of.alpha], path)
        sites[site] = _site_header(site, tensors[of.lora_a], tensors[of.lora_b], alpha, told, path)
    weights = {half for of in names.values() for half in (of.lora_a, of.lora_b)}
    dtype = widest({dtype_of(half, tensors[half], path) for half in weights})
    base_model = told.base_model if kind == "diffusers" else noted.get(KOHYA_BASE_MODEL)
    return _Read(AdapterHeader(sites, dtype, path.stem if name is None else name, base_model), names)


def kind_of(names: Mapping[str, object], path: Path) -> Kind:
    """Tell a file's format from the names of its tensors.

    Raises:
        AdapterFormatError: it is none that stands alone.
    """
    for name in names:
        if kind := what_is(name):
            raise AdapterFormatError(f"{path}: tensor '{name}' is not served: {kind}")
    if any(name.startswith(PREFIXES) for name in names):
        return "kohya"
    if any(parse_diffusers(name) for name in names):
        return "diffusers"
    if any(name.startswith("base_model.model.") for name in names):
        raise AdapterFormatError(
            f"{path} has PEFT's names but no adapter_config.json, without which its alphas are unknown; keep both "
            "files in one folder, named as PEFT saves them, and give the folder"
        )
    raise AdapterFormatError(
        f"{path} holds {len(names)} tensors ({', '.join(sorted(names)[:3]) or 'none'}, ...) and none has the name "
        "of a LoRA's: expected 'lora_unet_*', 'lora_te*_*' (kohya) or 'unet.*', 'text_encoder.*' (diffusers)"
    )


def _by_site(tensors: Mapping[str, TensorInfo], kind: Kind, path: Path) -> dict[str, _Names]:
    found: dict[str, dict[Part, str]] = {}
    for name in tensors:
        parsed = PARSERS[kind](name)
        if parsed is None:
            raise AdapterFormatError(
                f"{path}: tensor '{name}' is not served: it has no name of {kind}'s LoRAs"
            )
        site, part = parsed
        other = found.setdefault(site, {}).setdefault(part, name)
        if other != name:
            raise AdapterFormatError(f"{path}: tensors '{other}' and '{name}' are both {part} of '{site}'")
    for site, parts in found.items():
        for here, missing in (("lora_a", "lora_b"), ("lora_b", "lora_a"), ("alpha", "lora_a")):
            if here in parts and missing not in parts:
                raise AdapterFormatError(
                    f"{path}: site '{site}' has {here} ('{parts[here]}') and no {missing}"
                )
    return {site: _Names(of["lora_a"], of["lora_b"], of.get("alpha")) for site, of in found.items()}


def _alpha(file: BinaryIO, name: str, info: TensorInfo, path: Path) -> float:
    alpha = read_number(file, name, info, path)
    if not abs(alpha) < float("inf") or alpha == 0:
        # kohya's loader takes 0 for the rank, others for 0: no reading is right.
        raise AdapterFormatError(
            f"{path}: tensor '{name}' is {alpha}; expected a finite alpha that is not 0"
        )
    return alpha


def _site_header(
    site: str, a: TensorInfo, b: TensorInfo, alpha: float | None, told: DiffusersMetadata, path: Path
) -> SiteHeader:
    in_features, out_features, kernel_size = pair_sizes(site, a.shape, b.shape, path)
    rank = a.shape[0]
    if b.shape[1] != rank:
        raise AdapterFormatError(
            f"{path}: site '{site}' has rank {rank} in lora_a {list(a.shape)} and {b.shape[1]} in lora_b "
            f"{list(b.shape)}; both must be the same"
        )
    scaling = told.scaling(site, rank, path)
    if scaling is not None and alpha is not None:
        raise AdapterFormatError(
            f"{path}: both the metadata and an alpha tensor scale site '{site}'; keep one"
        )
    if scaling is None:
        scaling = 1.0 if alpha is None else alpha / rank
    return SiteHeader(rank, in_features, out_features, scaling, kernel_size)
