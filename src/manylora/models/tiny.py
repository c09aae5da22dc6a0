"""Tiny models with random weights, built in code: for tests, docs and measurements that download nothing."""

# Shapes: D in-features, O out-features, R rank.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from manylora.lora.adapter import Adapter, LoraPair
from manylora.models.config import LlamaConfig
from manylora.models.convert import write_hf
from manylora.models.llama import Llama
from manylora.models.loading import build_model
from manylora.models.sites import base_sites

TINY_END = "<|end|>"
"""The tiny tokenizer's only special token: it ends a message and an answer."""

_TINY_END_ID = 256  # after the 256 bytes

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_config(model_type: str = "llama", **changes: Any) -> LlamaConfig:
    """Return a two-layer config: width 64, 4 query heads on 2 key/value heads, a vocabulary of 257.

    Args:
        model_type: llama, mistral, qwen2 or qwen3, with what sets each apart.
        changes: other fields of LlamaConfig.
    """
    special: dict[str, dict[str, Any]] = {
        # Head sizes other than hidden_size / num_heads are what Qwen3 models have.
        "qwen3": {"qk_norm": True, "head_dim": 24},
        "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    }
    values: dict[str, Any] = {
        "model_type": model_type,
        "name": f"tiny-{model_type}",
        "vocab_size": _TINY_END_ID + 1,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position": 512,
        "eos_token_ids": (_TINY_END_ID,),
    }
    return LlamaConfig(**values | special.get(model_type, {}) | changes)


def tiny_weights(config: LlamaConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return random fp32 weights, named as in transformers; a function of config and seed.

    They are scaled so that every layer matters and the logits spread over several units: an argmax does not hang on
    a rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = Llama(config, dtype=torch.float32, device=torch.device("meta")).parameter_slots()
    return {name: _random_weight(name, slot.shape, generator) for name, slot in slots.items()}


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * values
    if name.endswith("bias"):
        return 0.3 * values
    # Rows of the embedding and of the output layer meet a vector of unit variance: logits get a deviation of 3.
    gain = 3.0 if "embed" in name or "lm_head" in name else 1.0
    return gain / math.sqrt(shape[-1]) * values


def tiny_model(
    config: LlamaConfig | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
) -> Llama:
    """Return a tiny decoder (a Llama where no config is given), ready to run."""
    config = config or tiny_config()
    return build_model(config, tiny_weights(config, seed).items(), dtype=dtype, device=device)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the bytes of the text, with a chat template."""
    # ByteLevel writes each byte as a printable character; the alphabet in the bytes' own order makes id == byte.
    characters = {byte: _byte_character(byte) for byte in range(256)}
    backend = Tokenizer(models.BPE({character: byte for byte, character in characters.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(TINY_END, normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TINY_END,
        pad_token=TINY_END,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_character(byte: int) -> str:
    """The character that ByteLevel writes for a byte: itself where Latin-1 can print it, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    unprintable = [other for other in range(256) if other not in printable]
    return chr(0x100 + unprintable.index(byte))


def save_tiny(directory: str | Path, config: LlamaConfig | None = None, *, seed: int = 0) -> Path:
    """Write a tiny model and its tokenizer as a transformers directory; returns it."""
    config = config or tiny_config()
    return write_hf(directory, config, tiny_weights(config, seed), tiny_tokenizer())


def tiny_adapter(
    config: LlamaConfig,
    *,
    rank: int | Mapping[str, int] = 4,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Adapter:
    """Return a random adapter whose delta is about a third of each base weight: it changes the answer.

    Args:
        rank: one for all sites, or one for each target by its last name ("q_proj"); then `targets` is ignored.
        targets: last names of the sites it changes, in every layer.
    """
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(targets, rank)
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for site, (in_features, out_features) in base_sites(config).items():
        site_rank = ranks.get(site.rpartition(".")[2])
        if site_rank is not None:
            lora_a = torch.randn(site_rank, in_features, generator=generator) / math.sqrt(
                in_features
            )  # [R, D]
            lora_b = torch.randn(out_features, site_rank, generator=generator) / math.sqrt(
                site_rank
            )  # [O, R]
            pairs[site] = LoraPair(lora_a.to(dtype), lora_b.to(dtype), scaling=1 / 3)
    return Adapter(pairs, name=name)
