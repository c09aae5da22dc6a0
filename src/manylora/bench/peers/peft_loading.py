"""Loads many adapters into one PEFT model, a layer at a time.

PEFT's own `load_adapter` walks all modules of the model several times, those of the earlier adapters included, so that
each adapter takes longer than the one before: the eleventh on SmolLM2-135M twice as long as the second. What runs is
PEFT's either way; only the way into its layers is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def load_peft_model(model: Any, folder: Path, names: Sequence[str]) -> Any:
    """Wrap the causal language model and load the PEFT directories `folder/name`, each under its name.

    All must change the sites that the first one changes.

    Raises:
        ValueError: one changes other sites, or is none that plain rank and alpha describe.
    """
    from peft import PeftModelForCausalLM
    from peft.tuners.lora import LoraLayer

    loaded = PeftModelForCausalLM.from_pretrained(model, folder / names[0], adapter_name=names[0])
    layers = {site: module for site, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    for name in names[1:]:
        _add(loaded, layers, folder / name, name)
    return loaded


def _add(loaded: Any, layers: dict[str, Any], directory: Path, name: str) -> None:
    """What `load_adapter` does for a plain LoRA, said to each layer directly."""
    from peft import LoraConfig
    from peft.utils.save_and_load import load_peft_weights

    config = LoraConfig.from_pretrained(directory)
    weights = load_peft_weights(str(directory), device="cpu")
    if weights.keys() != {f"{site}.lora_{side}.weight" for site in layers for side in "AB"}:
        raise ValueError(
            f"{directory} changes other sites than the first adapter; all must change the same"
        )
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(f"{directory} has ranks or alphas that differ by site; expected one of each")
    config.inference_mode, config.init_lora_weights = True, False
    for site, layer in layers.items():
        layer.update_layer(name, config.r, lora_alpha=config.lora_alpha, config=config)
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(weights[f"{site}.lora_A.weight"])
            layer.lora_B[name].weight.copy_(weights[f"{site}.lora_B.weight"])
    loaded.peft_config[name] = config
