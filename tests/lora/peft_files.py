"""PEFT adapters as bytes and folders, written without the package: what its readers are tested with."""

import json
from pathlib import Path

import torch
from safetensors.torch import save

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
SITE = "model.layers.0.self_attn.q_proj"


def peft_files(seed: int, rank: int = 4, features: int = 16) -> dict[str, bytes]:
    """Return the two files of an adapter of one site. Equal seeds give equal bytes."""
    generator = torch.Generator().manual_seed(seed)
    prefix = f"base_model.model.{SITE}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, features, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(features, rank, generator=generator),
    }
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    return {CONFIG_FILE: json.dumps(config).encode(), TENSOR_FILE: save(tensors)}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


def write_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    return write_files(folder, peft_files(seed, rank))
