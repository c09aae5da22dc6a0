"""Base models from files into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manylora.errors import ConfigError, ModelError
from manylora.models.config import LlamaConfig
from manylora.models.device import usable_device
from manylora.models.gguf import GgufModel
from manylora.models.hf_config import config_from_hf
from manylora.models.llama import Llama
from manylora.models.locate import ModelFiles, locate

MODEL_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

INT8 = "int8"
"""Dtype of a model whose products are on eight-bit integers; everything else of it, KV too, is float32."""


def load_model(
    source: str | Path, *, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu"
) -> Llama:
    """Load the decoder that `source` names (see locate.locate), ready to run.

    The peak is one copy of the weights in `dtype`, plus one tensor: files are memory-mapped and read tensor by tensor.
    Raises:
        ModelError: no such model, an architecture or setting that is not served, a tensor missing, unexpected or
            of another shape than the config says.
        ConfigError: a dtype that is neither in MODEL_DTYPES nor "int8", "int8" on another device than a CPU, or a
            device that is not there.
        KernelUnavailable: "int8" without the native kernels.
    """
    files = locate(source)
    if files.gguf is not None:
        gguf = GgufModel(files.gguf, name=files.name)
        return build_model(gguf.config, gguf.tensors(), dtype=dtype, device=device)
    return build_model(_hf_config(files), _hf_tensors(files), dtype=dtype, device=device)


def load_config(source: str | Path) -> LlamaConfig:
    """Read what `source` is without reading its weights; raises as load_model does."""
    files = locate(source)
    return _hf_config(files) if files.gguf is None else GgufModel(files.gguf, name=files.name).config


def build_model(
    config: LlamaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
) -> Llama:
    """Make a decoder of (name, tensor) pairs, named as in transformers; each is read when its turn comes."""
    int8 = dtype == INT8
    if int8 and not str(device).startswith("cpu"):
        raise ConfigError(
            f"dtype int8 runs on a CPU, got device {device}; choose bfloat16 or float16 there"
        )
    device = usable_device(device)
    model = Llama(config, dtype=torch.float32 if int8 else _model_dtype(dtype), device=device)
    slots = model.parameter_slots()
    others: dict[str, Tensor] = {}
    with torch.inference_mode():
        for name, tensor in tensors:
            slot = slots.pop(name, None)
            if slot is not None:
                _fill(slot, tensor, name, config)
            elif not name.endswith("rotary_emb.inv_freq"):  # old files store what the config gives
                others[name] = tensor
    _check_output_twin(others, model)
    if slots or others:
        raise ModelError(
            f"{config.label}: the weights do not fit its config; missing: {_some(slots)}; unexpected: {_some(others)}"
        )
    model.finish(int8=int8)
    return model


def _model_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str) and dtype in MODEL_DTYPES:
        return MODEL_DTYPES[dtype]
    if dtype in MODEL_DTYPES.values():
        assert isinstance(dtype, torch.dtype)
        return dtype
    raise ConfigError(f"a model's dtype is one of {[*MODEL_DTYPES, INT8]}, got {dtype!r}")


def _fill(slot: Tensor, tensor: Tensor, name: str, config: LlamaConfig) -> None:
    if tensor.shape != slot.shape or not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ModelError(
            f"{config.label}: tensor '{name}' must be {list(slot.shape)} of floating point (16 bits or more), "
            f"got {list(tensor.shape)} {tensor.dtype}"
        )
    slot.copy_(tensor)


def _check_output_twin(others: dict[str, Tensor], model: Llama) -> None:
    """Accept an output weight beside a tied embedding, as some tools write it, if it is the same."""
    if not model.config.tie_embeddings or "lm_head.weight" not in others:
        return
    twin = others.pop("lm_head.weight").to(model.embedding)
    if not torch.equal(twin, model.embedding):
        raise ModelError(
            f"{model.config.label}: tie_word_embeddings is true, but lm_head.weight differs from "
            "model.embed_tokens.weight; one of the two is wrong"
        )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" (+ {len(listed) - 4} more)" if len(listed) > 4 else ""
    return (", ".join(listed[:4]) or "none") + more


def _hf_config(files: ModelFiles) -> LlamaConfig:
    values = _read_json(files.directory / "config.json", files)
    generation = files.directory / "generation_config.json"
    if generation.is_file():
        # transformers ends an answer at generation_config's ids, where a chat model's end of turn often stands alone.
        eos = _read_json(generation, files).get("eos_token_id")
        values = values if eos is None else values | {"eos_token_id": eos}
    return config_from_hf(values, name=files.name)


def _read_json(path: Path, files: ModelFiles) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{files.name}': {path.name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(
            f"model '{files.name}': {path.name} must be a JSON object, got {type(values).__name__}"
        )
    return values


def _hf_tensors(files: ModelFiles) -> Iterator[tuple[str, Tensor]]:
    for path in _weight_files(files):
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model '{files.name}': {path.name} cannot be read: {error}") from error


def _weight_files(files: ModelFiles) -> list[Path]:
    index = files.directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, files).get("weight_map", {}).values()))
        return [files.directory / name for name in names]
    single = files.directory / "model.safetensors"
    if single.is_file():
        return [single]
    held = sorted(path.name for path in files.directory.iterdir())
    raise ModelError(
        f"model '{files.name}': no model.safetensors and no model.safetensors.index.json beside config.json; "
        f"the directory holds {held}. Pickled weights (.bin, .pt) are not read: save as safetensors."
    )
