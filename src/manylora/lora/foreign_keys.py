"""Tensors that are no plain LoRA: what they are, for the message that refuses them. Knows no file."""

from __future__ import annotations

import re

FOREIGN = {
    r".*(dora_scale|lora_magnitude_vector).*": "DoRA's magnitudes, which rescale the base weight",
    r".*[._]hada_.*": "LoHa, a Hadamard product of two low-rank pairs",
    r".*[._]lokr_.*": "LoKr, a Kronecker product",
    r".*\.lora_mid\.weight": "the core of a conv that was decomposed in three (LoCon with Tucker decomposition)",
    r".*\.(on_input|ia3_l|ia3_l\..*)": "(IA)^3, which rescales activations",
    r".*\.(diff|diff_b|set_weight)": "a whole weight or bias that was trained, no low-rank pair",
    r".*\.[wb]_norm": "a norm layer that was trained",
    r".*[._](oft_.*|boft_.*|oft)": "OFT, which rotates the base weight",
    r".*\.[ab][12]\.weight": "GLoRA, which also multiplies the base weight",
    r".*\.scalar": "LyCORIS's trained scalar; merge it into lora_up first",
    r".*\.lora_(up|down|[AB])\.bias": "a bias of a LoRA layer",
    r".*lora_embedding_[AB].*": "a LoRA of an embedding; only Linear and Conv2d are served",
    r"bundle_emb\..*|emb_params|string_to_.*": "an embedding of a textual inversion",
    r"lora_controlnet.*": "a control LoRA",
    r"(transformer|diffusion_model|lora_transformer_|lora_te3_).*": "of a model that is no UNet",
    r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*": "a weight of a whole checkpoint",
}
"""Names met in the wild, and what they are; the first that matches explains the refusal."""


def what_is(name: str) -> str | None:
    """Say what a tensor of this name is, if it is known and no part of a LoRA."""
    return next((kind for pattern, kind in FOREIGN.items() if re.fullmatch(pattern, name)), None)
