"""Engines on the tiny model, and what each request should give: the merged model in float64, without a cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from manylora.lora.adapter import Adapter
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture, MixtureLike
from manylora.models.dense_attention import DenseAttention
from manylora.models.llama import Llama
from manylora.models.loading import build_model
from manylora.models.tiny import tiny_adapter, tiny_config, tiny_model, tiny_tokenizer, tiny_weights
from manylora.text import Engine, EngineConfig, Policy, SamplingParams

CONFIG = tiny_config(name="tiny-llama")
PAGE_TOKENS = 4
PAGE_BYTES = CONFIG.num_layers * PAGE_TOKENS * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 8

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@cache
def adapters() -> Mapping[str, Adapter]:
    """Adapters of mixed ranks, sites and dtypes."""
    kinds: dict[str, tuple[int, tuple[str, ...], torch.dtype]] = {
        "a": (4, ALL, torch.float32),
        "b": (1, ALL, torch.bfloat16),
        "c": (9, ("q_proj", "v_proj"), torch.float32),
        "d": (3, ("down_proj",), torch.float16),
        "e": (16, ("k_proj", "gate_proj", "up_proj"), torch.bfloat16),
    }
    return {
        name: tiny_adapter(CONFIG, rank=rank, targets=targets, dtype=dtype, seed=seed, name=name)
        for seed, (name, (rank, targets, dtype)) in enumerate(kinds.items(), 1)
    }


def library() -> Library:
    result = Library()
    for name, adapter in adapters().items():
        result.add(name, adapter)
    return result


@cache
def _model(dtype: str) -> Llama:
    return tiny_model(CONFIG, dtype=dtype)


def engine(
    num_pages: int = 400,
    *,
    source: Library | None = None,
    dtype: str = "float64",
    policy: Policy | None = None,
    **settings: object,
) -> Engine:
    """An engine that checks itself after each step and poisons free pages."""
    config = EngineConfig.from_dict(
        {
            "pool_bytes": num_pages * PAGE_BYTES,
            "page_tokens": PAGE_TOKENS,
            "max_batch_tokens": 16,
            "max_num_seqs": 8,
            "debug": True,
            **settings,
        }
    )
    return Engine(_model(dtype), tiny_tokenizer(), library() if source is None else source, config, policy)


@cache
def expected(prompt: tuple[int, ...], mixture: Mixture, max_tokens: int) -> tuple[int, ...]:
    """Greedy tokens of the base to which the sum of the weighted deltas was added, each step a full forward pass."""
    model = _merged(mixture)
    tokens = list(prompt)
    for _ in range(max_tokens):
        attention = DenseAttention([len(tokens)], scale=CONFIG.attention_scale)
        logits = model(torch.tensor(tokens), attention.positions, attention)
        tokens.append(int(logits[-1].argmax()))
    return tuple(tokens[len(prompt) :])


@cache
def _merged(mixture: Mixture) -> Llama:
    weights = {name: tensor.double() for name, tensor in tiny_weights(CONFIG).items()}
    for name, weight in mixture.weights:
        for site, pair in adapters()[name].sites.items():
            weights[f"{site}.weight"] += weight * pair.delta()
    return build_model(CONFIG, weights.items(), dtype="float64")


def expect(prompt: list[int], mixture: MixtureLike, max_tokens: int = 12) -> tuple[int, ...]:
    return expected(tuple(prompt), Mixture.parse(mixture), max_tokens)
