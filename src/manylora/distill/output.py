"""What a finished run leaves: a LoRA or a whole model in diffusers' format, with distill.json; whole or not at all."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from manylora.distill.config import DistillConfig
from manylora.distill.learners import GUIDANCE, MAIN, DistilledLora, DistilledUnet
from manylora.lora.convert import save_adapter
from manylora.training.aside import directory_aside

RECORD = "distill.json"
"""Base and its hash, guidance and w, steps, settings, hashes of the files, what was measured."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def write_result(
    learner: DistilledLora | DistilledUnet,
    config: DistillConfig,
    base_folder: Path,
    record: Mapping[str, Any],
) -> None:
    """Write what was learnt to `config.out`."""
    with directory_aside(config.out) as aside:
        told = dict(record)
        if isinstance(learner, DistilledLora):
            told["adapters"] = _write_adapters(learner, config, aside)
        else:
            _write_pipeline(learner, config, base_folder, aside)
        told["sha256"] = {
            str(path.relative_to(aside)): _sha256(path) for path in sorted(aside.rglob("*.safetensors"))
        }
        (aside / RECORD).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _write_adapters(learner: DistilledLora, config: DistillConfig, folder: Path) -> dict[str, str]:
    """Write each adapter; returns their identities by the folder below `out`."""
    adapters = learner.adapters(_DTYPES[config.out_dtype])
    places = {MAIN: ".", GUIDANCE: GUIDANCE}
    for name, adapter in adapters.items():
        (folder / places[name]).mkdir(exist_ok=True)
        save_adapter(adapter, folder / places[name], "diffusers")
    return {places[name]: adapter.identity for name, adapter in adapters.items()}


def _write_pipeline(learner: DistilledUnet, config: DistillConfig, base_folder: Path, folder: Path) -> None:
    """Write the base's folder again with the distilled UNet in it."""
    shutil.copytree(base_folder, folder, dirs_exist_ok=True, ignore=_but_the_unet(base_folder))
    copy.deepcopy(learner.unet).to(_DTYPES[config.out_dtype]).save_pretrained(
        folder / "unet", safe_serialization=True
    )


def _but_the_unet(base_folder: Path) -> Any:
    def ignored(folder: str, names: list[str]) -> set[str]:
        return {"unet"} & set(names) if Path(folder) == base_folder else set()

    return ignored


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
