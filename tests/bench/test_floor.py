"""The floor, by hand on sizes that a reader can multiply."""

import pytest

from manylora.bench.ceilings import Ceilings
from manylora.bench.floor import DecoderCosts, adapter_bytes, floor_of, layer_products
from manylora.bench.text.workload import Trace, TraceRequest
from manylora.models.config import LlamaConfig

MODEL = LlamaConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    rms_norm_eps=1e-5,
    max_position=64,
)
COSTS = DecoderCosts(MODEL, itemsize=4)
SIZES = {0: 1000, 1: 3000}
# 1 GFLOP/s for few rows, 2 for many; 1 GB/s.
CEILINGS = Ceilings(memory_read_gb_s=1.0, gemm_gflop_s={32: 1.0, 128: 1.0, 512: 2.0})


def trace(*mixtures, prompt_len=3, output_tokens=3) -> Trace:
    return Trace(tuple(TraceRequest((1,) * prompt_len, mixture) for mixture in mixtures), output_tokens)


def test_sizes_of_the_decoder():
    assert layer_products(MODEL) == [(8, 4), (4, 4), (12, 4), (4, 6)]
    assert COSTS.flops_per_row == 2 * 2 * (32 + 16 + 48 + 24)
    assert COSTS.kv_bytes_per_token == 2 * 2 * 1 * 2 * 4
    # qkv: three sites that read 4, writing 4, 2 and 2; o; gate and up; down.
    per_layer = (4 + 4) + (4 + 2) + (4 + 2) + (4 + 4) + 2 * (4 + 6) + (6 + 4)
    assert adapter_bytes(MODEL, rank=3) == 2 * 3 * 2 * per_layer


def test_base_products_by_hand():
    floor = floor_of(trace(()), COSTS, SIZES, CEILINGS, max_batch=8)
    rows, logits = 3 + 2, 3
    assert floor.base_products_s == pytest.approx((rows * 480 + logits * 80) / 1e9)
    assert floor.lora_s == 0
    assert floor.num_output_tokens == 3
    assert floor.tokens_per_s == pytest.approx(3 / (floor.base_products_s + floor.attention_s))


def test_distinct_adapters_are_read_once_a_step():
    one, both = ((0, 1.0),), ((0, 1.0), (1, 0.5))
    few_rows = dict(prompt_len=1, output_tokens=3)  # 3 steps, the reading is what takes time
    assert floor_of(trace(one, **few_rows), COSTS, SIZES, CEILINGS, 8).lora_s == pytest.approx(
        3 * 1000 / 1e9
    )
    assert floor_of(trace(one, one, one, **few_rows), COSTS, SIZES, CEILINGS, 8).lora_s == pytest.approx(
        # Three rows cost 3000 operations at 1 GFLOP/s: more than reading 1000 bytes once. The prompts run at 2.
        (3000 / 2 + 2 * 3000) / 1e9
    )
    assert floor_of(trace(both, **few_rows), COSTS, SIZES, CEILINGS, 8).lora_s == pytest.approx(
        3 * 4000 / 1e9
    )


def test_attention_by_hand():
    floor = floor_of(trace((), ()), COSTS, SIZES, CEILINGS, 8)
    prefill_flops = 2 * (1 + 2 + 3) * 32
    attended = 2 * (4 + 5)  # two decode rows each, which see 4 and 5 tokens
    decode_s = max(attended * 32 / 1e9, attended * 32 / 2e9)
    assert floor.attention_s == pytest.approx(prefill_flops / 2e9 + decode_s)


def test_requests_beyond_the_batch_form_another_wave():
    together = floor_of(trace(*[((0, 1.0),)] * 2), COSTS, SIZES, CEILINGS, 2)
    apart = floor_of(trace(*[((0, 1.0),)] * 2), COSTS, SIZES, CEILINGS, 1)
    alone = floor_of(trace(((0, 1.0),)), COSTS, SIZES, CEILINGS, 1)
    assert apart.lora_s == pytest.approx(2 * alone.lora_s)
    assert together.lora_s < apart.lora_s or together.lora_s == pytest.approx(apart.lora_s)
    assert apart.base_products_s == pytest.approx(2 * alone.base_products_s)
