"""The least time that a trace can take on a machine with given ceilings.

Three kinds of work follow one another in every layer, so their times add:

    base products   floating point operations at the measured rate for that many rows (weights read included)
    LoRA            the larger of: each distinct adapter read once a step; its operations at the base products' rate
    attention       the larger of: KV of the context read once a step; its operations at that rate

Norms, activations, sampling and everything of Python's count as nothing. Requests run in waves of `max_batch`:
first all prompts, then one token each per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.bench.ceilings import Ceilings
from manylora.bench.text.workload import Trace, TraceRequest
from manylora.kernels import bytes_of_row
from manylora.models.config import LlamaConfig
from manylora.models.sites import Stack, base_sites, stack_shape


@dataclass(frozen=True)
class DecoderCosts:
    """Operations and bytes of a decoder."""

    config: LlamaConfig
    itemsize: int
    """Bytes of a value of KV."""

    @property
    def flops_per_row(self) -> int:
        """Of the products of all layers, for one token."""
        return 2 * self.config.num_layers * sum(out * fan_in for out, fan_in in layer_products(self.config))

    @property
    def flops_per_logits(self) -> int:
        return 2 * self.config.vocab_size * self.config.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim * self.itemsize

    @property
    def flops_per_attended(self) -> int:
        """One query against one token of its context, all heads and layers: score and value."""
        return 4 * self.config.num_layers * self.config.num_heads * self.config.head_dim


def layer_products(config: LlamaConfig) -> list[tuple[int, int]]:
    """(out, in) of the products of a layer, stacked as the decoder runs them."""
    shapes = [stack_shape(config, stack) for stack in Stack]
    return [(shape.out_features, shape.in_features) for shape in shapes]


def adapter_bytes(config: LlamaConfig, rank: int, dtype: str = "bfloat16") -> int:
    """Bytes of A and B of an adapter of one rank on all sites, as its rank rows lie in the pool."""
    row_dtype = getattr(torch, dtype)
    return rank * sum(
        bytes_of_row(row_dtype, width) for fans in base_sites(config).values() for width in fans
    )


@dataclass(frozen=True)
class Floor:
    """Seconds of each kind of work, and the throughput if there were nothing else."""

    base_products_s: float
    lora_s: float
    attention_s: float
    num_output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / (self.base_products_s + self.lora_s + self.attention_s)


def floor_of(
    trace: Trace, costs: DecoderCosts, adapter_bytes: Mapping[int, int], ceilings: Ceilings, max_batch: int
) -> Floor:
    """The floor of a trace.

    Args:
        adapter_bytes: adapter to the bytes of its A and B, two a value (bfloat16).
    """
    base_s = lora_s = attention_s = 0.0
    for begin in range(0, len(trace.requests), max_batch):
        wave = trace.requests[begin : begin + max_batch]
        base_s += _base_s(wave, trace.output_tokens, costs, ceilings)
        lora_s += _lora_s(wave, trace.output_tokens, adapter_bytes, ceilings)
        attention_s += _attention_s(wave, trace.output_tokens, costs, ceilings)
    return Floor(base_s, lora_s, attention_s, trace.num_output_tokens)


def _base_s(
    wave: Sequence[TraceRequest], output_tokens: int, costs: DecoderCosts, ceilings: Ceilings
) -> float:
    prompt_tokens = sum(len(request.prompt) for request in wave)
    prefill_flops = prompt_tokens * costs.flops_per_row
    # The last token's own row is never computed: the answer ends with it.
    decode_flops = len(wave) * (
        (output_tokens - 1) * costs.flops_per_row + output_tokens * costs.flops_per_logits
    )
    return prefill_flops / _flop_s(ceilings, prompt_tokens) + decode_flops / _flop_s(ceilings, len(wave))


def _lora_s(
    wave: Sequence[TraceRequest], output_tokens: int, adapter_bytes: Mapping[int, int], ceilings: Ceilings
) -> float:
    distinct = {adapter for request in wave for adapter, _ in request.mixture}
    read_s = sum(adapter_bytes[adapter] for adapter in distinct) / _byte_s(ceilings)
    # Two operations a value, and a value has two bytes at most: a row costs as many operations as its adapters have
    # bytes, or more. A floor may be too low.
    row_flops = [sum(adapter_bytes[adapter] for adapter, _ in request.mixture) for request in wave]
    prefill_flops = sum(len(request.prompt) * flops for request, flops in zip(wave, row_flops, strict=True))
    decode_s = max(read_s, sum(row_flops) / _flop_s(ceilings, len(wave)))
    return (
        max(read_s, prefill_flops / _flop_s(ceilings, max(ceilings.gemm_gflop_s)))
        + (output_tokens - 1) * decode_s
    )


def _attention_s(
    wave: Sequence[TraceRequest], output_tokens: int, costs: DecoderCosts, ceilings: Ceilings
) -> float:
    flop_s = _flop_s(ceilings, max(ceilings.gemm_gflop_s))
    prompts = [len(request.prompt) for request in wave]
    prefill_s = costs.flops_per_attended * sum(length * (length + 1) / 2 for length in prompts) / flop_s
    # Decode row k of a request (k from 1) sees its prompt and k tokens of its answer.
    rows = output_tokens - 1
    attended = rows * sum(prompts) + len(wave) * rows * (rows + 1) / 2
    decode_s = max(
        attended * costs.kv_bytes_per_token / _byte_s(ceilings),
        attended * costs.flops_per_attended / flop_s,
    )
    return prefill_s + decode_s


def _flop_s(ceilings: Ceilings, rows: int) -> float:
    return ceilings.gemm_at(rows) * 1e9


def _byte_s(ceilings: Ceilings) -> float:
    return ceilings.memory_read_gb_s * 1e9
