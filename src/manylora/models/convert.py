"""Models written as transformers reads them: to train with PEFT on exactly the weights that are served."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from manylora.errors import ModelError
from manylora.models.config import LlamaConfig
from manylora.models.gguf import GgufModel
from manylora.models.hf_config import config_to_hf
from manylora.models.locate import locate
from manylora.models.tokenizer import load_tokenizer


def save_hf(source: str | Path, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the GGUF model that `source` names, dequantised to `dtype`, as a transformers directory; returns it.

    Raises:
        ModelError: `source` is a transformers directory already, or `directory` exists.
    """
    files = locate(source)
    if files.gguf is None:
        raise ModelError(f"model '{files.name}' is laid out for transformers already, at {files.directory}")
    model = GgufModel(files.gguf, name=files.name)
    tensors = {name: tensor.to(dtype) for name, tensor in model.tensors()}
    return write_hf(directory, model.config, tensors, load_tokenizer(source))


def write_hf(
    directory: str | Path,
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files; all or nothing.

    Args:
        tensors: named as in transformers, of one dtype, no two sharing memory.
    Raises:
        ModelError: `directory` exists.
    """
    target = Path(directory).expanduser()
    if target.exists():
        raise ModelError(f"'{target}' exists already; name a new directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        _write_json(aside / "config.json", config_to_hf(config) | {"dtype": dtype})
        ends = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
        _write_json(aside / "generation_config.json", ends)
        save_file(dict(tensors), aside / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(aside)
        # mkdtemp and safetensors make what nobody else may read.
        aside.chmod(0o755)
        (aside / "model.safetensors").chmod(0o644)
        os.rename(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
