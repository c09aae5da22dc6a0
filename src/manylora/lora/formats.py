"""Adapters as directories that PEFT writes and reads: adapter_config.json beside adapter_model.safetensors.

Every tensor and every key of the config is used, or refused by name.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manylora.errors import AdapterFormatError, ConfigError
from manylora.lora.adapter import Adapter, widest
from manylora.lora.header import AdapterHeader, dtype_of, pair_sizes, tensors_of
from manylora.lora.pairs import PairTable, SiteHeader
from manylora.lora.peft_config import PeftConfig, config_for, parse_config
from manylora.lora.peft_folder import (
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_folder,
    readable,
    replace_files,
    unchanged,
)
from manylora.lora.spans import KnownSpans, PairSpans
from manylora.lora.tensor_file import (
    TensorInfo,
    decode_tensors,
    encode_tensors,
    first_bytes,
    read_header,
    read_whole,
)

__all__ = [
    "AdapterHeader",
    "SiteHeader",
    "load_peft",
    "peek_peft",
    "save_peft",
    "CONFIG_FILE",
    "TENSOR_FILE",
]

TENSOR_NAME = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(?P<half>[AB])\.weight")

FOREIGN_TENSORS = {
    r".*lora_magnitude_vector.*": "DoRA's magnitudes, which rescale the base weight",
    r".*\.lora_embedding_[AB]": "a LoRA of an embedding; only Linear and Conv2d are served",
    r".*\.lora_B\.bias": "a bias of lora_B (lora_bias)",
    r".*\.lora_[AB]\..+\.weight": "a name that holds the adapter's name; PEFT's save_pretrained drops it",
    r".*\.lora_(down|up)\.weight|.*\.alpha": "a name of kohya's format; convert the file to PEFT's",
    r".*\.base_layer\..*": "a weight of the base model; save with save_embedding_layers=False",
    r"base_model\.model\..*": "a whole module that was trained too (modules_to_save)",
    r".*": "not a name of PEFT, which begin with 'base_model.model.'",
}
"""Names met in the wild, and what they are; the first that matches explains the refusal."""


def peek_peft(directory: str | Path, name: str | None = None) -> AdapterHeader:
    """Check and return what is known of an adapter without its weights, of which none is read.

    Raises:
        AdapterNotFoundError, AdapterFormatError, AdapterUnavailableError: as `load_peft`, except that values are
            not seen.
    """
    with readable(directory):
        folder = adapter_folder(directory)
        with unchanged(folder):
            config = _read_config(folder)
            with (folder / TENSOR_FILE).open("rb") as file:
                tensors = read_header(file, folder / TENSOR_FILE)
    return _header(config, tensors, folder, folder.name if name is None else name)


def load_peft(directory: str | Path, name: str | None = None, *, validated: bool = True) -> Adapter:
    """Load an adapter. Tensors keep the dtype of the file; mixed dtypes become one that holds all exactly.

    Args:
        directory: a PEFT directory, or one of the two files in it.
        name: for messages; the directory's name by default.
        validated: False leaves `Adapter.validate` to the caller.

    Raises:
        AdapterNotFoundError: there is no such directory.
        AdapterFormatError: a file is missing, broken or holds what is not served; a value is NaN or Inf.
        AdapterUnavailableError: a file cannot be read now: no permission, a disk that fails.
    """
    with readable(directory):
        folder = adapter_folder(directory)
        with unchanged(folder):
            config = _read_config(folder)
            data = read_whole(folder / TENSOR_FILE)
    key = (config.key, first_bytes(data))
    spans = _KNOWN.get(key)
    if spans is None or spans.file_bytes != len(data):
        spans = _spans(config, data, folder)
        _KNOWN.keep(key, spans)
    adapter = Adapter(
        spans.pairs(data), name=folder.name if name is None else name, base_model=config.base_model
    )
    if validated:
        adapter.validate()
    return adapter


_KNOWN = KnownSpans()


def save_peft(adapter: Adapter, directory: str | Path, base_model: str | None = None) -> None:
    """Write an adapter; loading it gives the same deltas here and in PEFT, and here the same id.

    The files are written aside and renamed: a new directory appears whole. In a directory that exists the two
    files are replaced and others stay; whoever reads meanwhile gets the old adapter, the new one or an error.

    Args:
        base_model: what PEFT is told the adapter is for; the adapter's own by default.

    Raises:
        AdapterFormatError: the adapter is not sound, or PEFT's config cannot say one of its scalings.
        ConfigError: `directory` is a file, or is named like one.
        OSError: it cannot be written.
    """
    folder = Path(directory)
    if folder.suffix == ".safetensors" or folder.is_file():
        raise ConfigError(
            f"PEFT's format is a folder, not the file '{folder}'; give a folder, or write one file with "
            "`manylora convert --format kohya` or `--format diffusers`"
        )
    adapter.validate()
    scalings = {site: (pair.rank, pair.scaling) for site, pair in adapter.sites.items()}
    config = config_for(scalings, base_model or adapter.base_model, adapter.label)
    data = (json.dumps(config, indent=2) + "\n").encode()
    replace_files(folder, config=data, tensors=encode_tensors(_peft_tensors(adapter)))


def _read_config(folder: Path) -> PeftConfig:
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{path} must hold an object, got {type(values).__name__}")
    return parse_config(values, str(path))


def _spans(config: PeftConfig, data: NDArray[np.uint8], folder: Path) -> PairSpans:
    """Work out what the files hold, each tensor of it."""
    path = folder / TENSOR_FILE
    whole = data.tobytes()
    tensors = read_header(io.BytesIO(whole), path)
    header = _header(config, tensors, folder)
    decode_tensors(whole, path)  # what else the format asks of a header, its library knows
    halves = [
        tensors[f"base_model.model.{site}.lora_{half}.weight"] for site in header.sites for half in "AB"
    ]
    return PairSpans(PairTable(header.sites, header.dtype), halves, len(data))


def _header(
    config: PeftConfig, tensors: Mapping[str, TensorInfo], folder: Path, name: str = ""
) -> AdapterHeader:
    halves = _halves(tensors, folder / TENSOR_FILE)
    sites = {}
    for site, (a, b) in sorted(halves.items()):
        reason = config.why_not(site)
        if reason:
            raise AdapterFormatError(f"{folder}: there are weights for site '{site}', but {reason}")
        sites[site] = _site_header(site, a.shape, b.shape, config, folder)
    dtype = widest({dtype_of(name, info, folder) for name, info in tensors.items()})
    return AdapterHeader(sites, dtype, name, config.base_model)


def _halves(tensors: Mapping[str, TensorInfo], path: Path) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """lora_A and lora_B of each site. A tensor that is neither is refused, as is a half without the other."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            kind = next(kind for pattern, kind in FOREIGN_TENSORS.items() if re.fullmatch(pattern, name))
            raise AdapterFormatError(f"{path}: tensor '{name}' is not served: {kind}")
        found.setdefault(match["site"], {})[match["half"]] = info
    if not found:
        raise AdapterFormatError(f"{path} holds no LoRA tensor, so the adapter would change nothing")
    for site, halves in found.items():
        if len(halves) == 1:
            here, missing = ("lora_A", "lora_B") if "A" in halves else ("lora_B", "lora_A")
            raise AdapterFormatError(f"{path}: site '{site}' has a {here} and no {missing}")
    return {site: (halves["A"], halves["B"]) for site, halves in found.items()}


def _site_header(
    site: str, a: tuple[int, ...], b: tuple[int, ...], config: PeftConfig, folder: Path
) -> SiteHeader:
    in_features, out_features, kernel_size = pair_sizes(site, a, b, folder)
    rank = config.rank(site)
    if a[0] != rank or b[1] != rank:
        raise AdapterFormatError(
            f"{folder}: the config (r, rank_pattern) gives site '{site}' rank {rank}, but lora_A is {list(a)} "
            f"and lora_B is {list(b)}"
        )
    return SiteHeader(rank, in_features, out_features, config.scaling(site), kernel_size)


def _peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for site, pair in adapter.sites.items():
        a, b = tensors_of(pair)
        tensors[f"base_model.model.{site}.lora_A.weight"] = a
        tensors[f"base_model.model.{site}.lora_B.weight"] = b
    return tensors
