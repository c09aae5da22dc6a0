"""What a finished run leaves: the adapter in PEFT's or diffusers' files, and training.json; whole or not at all."""

import json
from typing import Any

import torch

from manylora.lora.adapter import Adapter
from manylora.lora.convert import DIFFUSERS_FILE, save_adapter
from manylora.lora.peft_folder import CONFIG_FILE
from manylora.train.image_config import ImageTrainConfig
from manylora.training.aside import directory_aside

MARKS = (CONFIG_FILE, DIFFUSERS_FILE)
"""Files of which an adapter's folder has one."""

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def write_adapter(adapter: Adapter, config: ImageTrainConfig, record: dict[str, Any]) -> None:
    """Write the adapter and its training.json to `config.out`."""
    with directory_aside(config.out) as aside:
        save_adapter(adapter, aside, config.out_format)
        (aside / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
