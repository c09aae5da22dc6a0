"""transformers' own models as the second opinion on ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from manylora.models.dense_attention import DenseAttention
from manylora.models.llama import Llama, LoraHook


def our_logits(model: Llama, tokens: Tensor, lora: LoraHook | None = None) -> Tensor:  # [T, vocab]
    attention = DenseAttention([len(tokens)], scale=model.config.attention_scale)
    logits: Tensor = model(tokens, attention.positions, attention, lora)
    return logits


def transformers_model(directory: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **kwargs)
    return model.eval()


@torch.inference_mode()
def their_logits(model: nn.Module, tokens: Tensor) -> Tensor:  # [T, vocab]
    logits: Tensor = model(tokens[None]).logits[0]
    return logits


def with_exact_norms(model: nn.Module) -> nn.Module:
    """transformers rounds every RMSNorm to fp32, also in an fp64 model; put norms in its own dtype in their place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                weight = child.weight
                assert isinstance(weight, Tensor)
                eps = child.variance_epsilon
                assert isinstance(eps, float)
                norm = nn.RMSNorm(weight.shape[0], eps=eps, dtype=weight.dtype)
                norm.weight = nn.Parameter(weight)
                setattr(parent, name, norm)
    return model
