"""What each key of PEFT's LoRA config means for inference: used, inert, or refused when it is set.

The keys are those of `LoraConfig` in PEFT 0.21.2. A key of no list is refused by name: a newer PEFT
may have given it a meaning that changes what the adapter computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manylora.errors import AdapterFormatError

USED = frozenset(
    "peft_type base_model_name_or_path r lora_alpha use_rslora rank_pattern alpha_pattern target_modules "
    "exclude_modules layers_to_transform layers_pattern init_lora_weights".split()
)

INERT = {
    "task_type": "names the head class that PEFT wraps around the model",
    "auto_mapping": "names the base class for PEFT's auto classes",
    "peft_version": "who wrote the file",
    "revision": "of the base model, which whoever loads the adapter chooses",
    "inference_mode": "whether PEFT freezes the adapter",
    "lora_dropout": "training only",
    "loftq_config": "acts through init_lora_weights",
    "eva_config": "acts through init_lora_weights, and on ranks that rank_pattern records",
    "corda_config": "acts through init_lora_weights",
    "lora_ga_config": "acts through init_lora_weights",
    "qalora_group_size": "acts through use_qalora",
    "megatron_core": "acts through megatron_config",
    "runtime_config": "how PEFT runs, not what it computes",
}

REFUSED = {
    "fan_in_fan_out": "the base weight is stored transposed, as in GPT-2's Conv1D",
    "bias": "biases of the base model were trained too and are no low-rank pair",
    "modules_to_save": "whole modules were trained too and are no low-rank pair",
    "trainable_token_indices": "rows of the embedding were trained too and are no low-rank pair",
    "target_parameters": "the adapter changes parameters that are no module's weight",
    "use_dora": "DoRA rescales the base weight",
    "lora_bias": "lora_B has a bias",
    "alora_invocation_tokens": "aLoRA acts only on the tokens after its invocation",
    "use_qalora": "QA-LoRA pools the input of lora_A",
    "use_bdlora": "BD-LoRA stores block-diagonal matrices",
    "arrow_config": "Arrow routes between adapters by a rule of its own",
    "kasa_config": "KaSA changes the base weight and puts a diagonal between lora_A and lora_B",
    "monteclora_config": "MonteCLoRA samples perturbations of lora_A",
    "velora_config": "VeLoRA stores state beside lora_A and lora_B",
    "layer_replication": "the adapter is for a stack of repeated layers",
    "megatron_config": "the sites are Megatron's parallel layers",
    "ensure_weight_tying": "the adapter of one site also acts at another, tied one",
}

UNSET: tuple[object, ...] = (None, False, "none", [], {})
"""Values that leave a refused key without effect."""

SOUND_INITS: tuple[object, ...] = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base weight alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
subtract the initial B A from it: what they train is no change of the base model that the file names."""


def refuse_keys(values: Mapping[str, Any], source: str) -> None:
    """Check that no key has a meaning that would be lost; `source` is how messages call the file.

    Raises:
        AdapterFormatError: the file is not for LoRA, or a key is refused or unknown.
    """
    if values.get("peft_type") != "LORA":
        raise AdapterFormatError(
            f"{source}: peft_type is {values.get('peft_type')!r}, only 'LORA' is served"
        )
    for key, value in values.items():
        if key in REFUSED and value not in UNSET:
            raise AdapterFormatError(f"{source}: {key} = {value!r} is not served: {REFUSED[key]}")
        if key not in USED and key not in INERT and key not in REFUSED:
            raise AdapterFormatError(
                f"{source}: unknown key '{key}' = {value!r} of PEFT {values.get('peft_version')}; "
                "remove it if it changes nothing at inference"
            )
    init = values.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in SOUND_INITS:
        raise AdapterFormatError(
            f"{source}: init_lora_weights = {init!r} changes the base weight, so the adapter alone is not "
            "what was trained; save it with PEFT's path_initial_model_for_weight_conversion"
        )
