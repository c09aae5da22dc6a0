"""What a finished run leaves: a PEFT directory with training.json, whole or not at all."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from manylora.lora.tensor_file import encode_tensors
from manylora.train.text_config import TextTrainConfig
from manylora.train.text_model import TextStudent
from manylora.training.aside import directory_aside

CONFIG_FILE = "adapter_config.json"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_adapter(student: TextStudent, config: TextTrainConfig, record: dict[str, Any]) -> None:
    """Write adapter_config.json, adapter_model.safetensors and training.json to `config.out`."""
    from peft import get_peft_model_state_dict

    # save_embedding_layers "auto" would ask the hub whether the vocabulary grew. It cannot have.
    tensors = get_peft_model_state_dict(student.model, save_embedding_layers=False)
    dtype = _DTYPES[config.out_dtype]
    with directory_aside(config.out) as aside:
        peft_config = student.model.peft_config["default"]
        peft_config.base_model_name_or_path = config.base_name or config.model
        peft_config.inference_mode = True
        peft_config.save_pretrained(aside)
        _sort_targets(aside / CONFIG_FILE)
        in_dtype = {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
        (aside / "adapter_model.safetensors").write_bytes(encode_tensors(in_dtype))
        (aside / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def command_line(config: Any, kind: str = "text") -> str:
    """Return the command that repeats a run: every setting of the dataclass that differs from its default."""
    words = ["manylora", "train", kind]
    for setting in fields(config):
        value = getattr(config, setting.name)
        if value == setting.default:
            continue
        option = "--" + setting.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else "--no-" + option[2:])
        else:
            words += [option, ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _sort_targets(path: Path) -> None:
    """PEFT writes a set, in an order that changes from run to run."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(values["target_modules"], list):
        values["target_modules"].sort()
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
