"""What a finished run leaves: the adapter in PEFT's or diffusers' files, and training.json; whole or not at all."""

import json
from pathlib import Path
from typing import Any

import torch

from manylora.errors import ConfigError
from manylora.lora.adapter import Adapter
from manylora.lora.convert import DIFFUSERS_FILE, save_adapter
from manylora.lora.peft_folder import CONFIG_FILE
from manylora.train.image_config import ImageTrainConfig
from manylora.training.aside import directory_aside

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def refuse_to_replace(out: Path) -> None:
    """Raise ConfigError if `out` holds something that is no adapter: writing would delete it."""
    if not out.exists():
        return
    is_adapter = any((out / file).exists() for file in (CONFIG_FILE, DIFFUSERS_FILE))
    if not (out.is_dir() and (is_adapter or not any(out.iterdir()))):
        raise ConfigError(
            f"out = {out} exists and is no adapter; it would be replaced. Choose another folder"
        )


def write_adapter(adapter: Adapter, config: ImageTrainConfig, record: dict[str, Any]) -> None:
    """Write the adapter and its training.json to `config.out`."""
    with directory_aside(config.out) as aside:
        save_adapter(adapter, aside, config.out_format)
        (aside / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
