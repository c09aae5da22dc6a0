"""All layers in one call of native code: the bits of the calls one by one, and what does not go that way."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from manylora.errors import ConfigError
from manylora.kernels import KvLayout, PagedSequences, native, ops
from manylora.kernels.native import decoder, tiles
from manylora.kernels.native.decoder import StepAttention, StepLora
from manylora.kernels.native.int8 import Int8Weight
from manylora.models import llama as llama_module
from manylora.models.adapter_pages import AdapterPages
from manylora.models.config import LlamaConfig
from manylora.models.llama import Llama
from manylora.models.loading import build_model
from manylora.models.lora_batch import Item, LoraBatch, LoraBatchBuilder
from manylora.models.paged_attention import PagedAttention
from manylora.models.sites import Stack
from manylora.models.stacked_lora import StackedLora, decoder_stacks
from manylora.models.tiny import tiny_adapter, tiny_config, tiny_weights

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="there are no native kernels here")

CONFIGS = {
    "llama": tiny_config(),
    "biases": tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True),
    "one kv head": tiny_config(num_kv_heads=1),
    "head_dim of its own": tiny_config(head_dim=8, num_layers=3),
    "tied": tiny_config(tie_embeddings=True),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = [(7, 7), (20, 20), (1, 1)], [(8, 1), (23, 3), (2, 1)]
"""Of each step and sequence: tokens with the new ones, and new tokens."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call for all layers that was made had adapters."""
    made: list[bool] = []

    def noted(*arguments):
        made.append(arguments[5] is not None)
        return decoder.run_layers(*arguments)

    monkeypatch.setattr(llama_module, "run_layers", noted)
    return made


def model_of(config: LlamaConfig, dtype: str = "int8") -> Llama:
    return build_model(config, tiny_weights(config).items(), dtype=dtype)


def step_of(
    model: Llama, lengths: list[tuple[int, int]], kv_dtype: torch.dtype, pages: Tensor
) -> StepAttention:
    config = model.config
    layout = KvLayout(config.num_layers, 4, config.num_kv_heads, config.head_dim, kv_dtype)
    block_table = torch.arange(len(lengths) * 6, dtype=torch.int32).view(6, -1).T.contiguous()
    context, new = torch.tensor(lengths, dtype=torch.int32).T.contiguous()
    sequences = PagedSequences(block_table, torch.cat([new.new_zeros(1), new.cumsum(0)]).int(), context)
    at = [(i, token) for i, (total, more) in enumerate(lengths) for token in range(total - more, total)]
    slot_page = torch.tensor([int(block_table[i, token // 4]) for i, token in at])
    return StepAttention(
        pages,
        layout,
        sequences,
        slot_page,
        torch.tensor([token % 4 for _, token in at]),
        config.attention_scale,
    )


def pages_for(model: Llama, kv_dtype: torch.dtype) -> Tensor:
    config = model.config
    layout = KvLayout(config.num_layers, 4, config.num_kv_heads, config.head_dim, kv_dtype)
    return torch.zeros(18, layout.page_bytes, dtype=torch.uint8)


def lora_of(config: LlamaConfig, num_rows: int, *, targets: tuple[str, ...] = TARGETS) -> LoraBatch:
    """The first half of the rows runs a mixture, then one row the base, all others one adapter."""
    adapters = [tiny_adapter(config, rank=rank, seed=rank, targets=targets) for rank in (3, 9)]
    # The second one leaves some stacks alone.
    sites = {
        site: pair
        for site, pair in adapters[1].sites.items()
        if "o_proj" not in site and "layers.1.mlp" not in site
    }
    adapters[1] = replace(adapters[1], sites=sites)
    pool = AdapterPages(torch.zeros(60, 4096, dtype=torch.uint8), decoder_stacks(config))
    resident, first = {}, 0
    for adapter in adapters:
        image = pool.layout(adapter)
        resident[adapter.identity] = pool.write(image, range(first, first + image.num_pages))
        first += image.num_pages
    one, other = (adapter.identity for adapter in adapters)
    half = num_rows // 2
    items = [Item(0, half, ((one, 0.5), (other, -1.5))), Item(half + 1, num_rows, ((other, 1.0),))]
    batch = LoraBatchBuilder(pool.pages, decoder_stacks(config)).build(items, resident)
    assert batch is not None
    return batch


def two_steps(
    model: Llama, kv_dtype: torch.dtype, *, at_once: bool, with_lora: bool
) -> tuple[list[Tensor], Tensor]:
    """Logits of a step that fills KV and of one that goes on, and the pool after them."""
    pages, logits = pages_for(model, kv_dtype), []
    generator = torch.Generator().manual_seed(0)
    for lengths in LENGTHS:
        step = step_of(model, lengths, kv_dtype, pages)
        positions = torch.cat([torch.arange(total - new, total) for total, new in lengths])
        tokens = torch.randint(0, 257, positions.shape, generator=generator)
        paged = PagedAttention(step)
        lora = StackedLora(lora_of(model.config, len(tokens)), model.config) if with_lora else None
        logits.append(model(tokens, positions, paged if at_once else paged.__call__, lora))
    return logits, pages


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int8", "int8 without tiles"])
@pytest.mark.parametrize("name", CONFIGS)
def test_has_the_bits_of_the_calls_one_by_one(name, dtype, kv_dtype, calls, monkeypatch):
    if dtype == "int8 without tiles":
        monkeypatch.setattr(tiles, "is_available", lambda: False)
    model = model_of(CONFIGS[name], dtype.split()[0])
    weights = model.native_weights()
    if weights is None:
        assert dtype == "float32"
        assert not tiles.is_available()
        pytest.skip("float32 products are not native on this processor")
    kinds = {type(product) for layer in weights.layers for product in layer.products}
    assert len(kinds) == 1
    assert (Int8Weight in kinds) == (dtype == "int8 without tiles" or not tiles.is_available())

    of_base, _ = two_steps(model, kv_dtype, at_once=True, with_lora=False)
    got, pool = two_steps(model, kv_dtype, at_once=True, with_lora=True)
    assert calls == [False, False, True, True]
    want, wanted_pool = two_steps(model, kv_dtype, at_once=False, with_lora=True)
    assert len(calls) == 4

    assert torch.equal(pool, wanted_pool)
    assert pool.any()
    for ours, theirs, base in zip(got, want, of_base, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours - base).abs().max() > 0.1, "the adapters must matter"
    assert all(map(torch.equal, of_base, two_steps(model, kv_dtype, at_once=False, with_lora=False)[0]))


def test_a_product_that_was_finished_again_counts():
    """As where an adapter is merged into a model that has run."""
    model = model_of(tiny_config())
    (before, _), _ = two_steps(model, torch.float32, at_once=True, with_lora=False)
    product = model.base_product(1, Stack.DOWN)
    product.weight = -product.dense_weight()
    product.finish(int8=True)
    (after, _), _ = two_steps(model, torch.float32, at_once=True, with_lora=False)
    (want, _), _ = two_steps(model, torch.float32, at_once=False, with_lora=False)
    assert torch.equal(after, want)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("config", "dtype", "kv_dtype"),
    [
        (tiny_config("qwen3"), "int8", torch.float32),  # its heads are normed between two kernels
        (tiny_config(), "float64", torch.float64),
        (tiny_config(), "bfloat16", torch.bfloat16),
        (tiny_config(), "int8", torch.float16),
    ],
    ids=str,
)
def test_what_is_not_all_native_runs_call_by_call(config, dtype, kv_dtype, calls):
    logits, _ = two_steps(model_of(config, dtype), kv_dtype, at_once=True, with_lora=True)
    assert not calls
    assert all(one.isfinite().all() for one in logits)


def test_nor_does_anything_where_native_kernels_are_not_wanted(calls, monkeypatch):
    model = model_of(tiny_config())
    others = {name: backend for name, backend in ops.BACKENDS.items() if name != "native"}
    monkeypatch.setattr(ops, "BACKENDS", others)
    two_steps(model, torch.float32, at_once=True, with_lora=True)
    assert not calls


def test_a_rank_row_beyond_the_pool_is_refused_in_words(calls):
    model = model_of(tiny_config())
    pages = pages_for(model, torch.float32)
    step = step_of(model, LENGTHS[0], torch.float32, pages)
    batch = lora_of(model.config, 28)
    batch.adapters.rows.offset[-1] = batch._pages.numel() - 3
    with pytest.raises(ConfigError, match=r"a rank row of segment .* but the pool has"):
        model(
            torch.zeros(28, dtype=torch.long),
            torch.arange(28),
            PagedAttention(step),
            StackedLora(batch, model.config),
        )
    assert not calls


@pytest.mark.parametrize(
    ("changes", "num_rows", "message"),
    [
        ({"pages": torch.zeros(18, 64, dtype=torch.uint8)}, 28, "pages must be contiguous"),
        ({"slot_page": torch.zeros(5, dtype=torch.long)}, 28, r"slot_page must be \[28\] torch.int64"),
        ({"slot_index": torch.zeros(28, dtype=torch.int32)}, 28, r"slot_index must be \[28\] torch.int64"),
        ({"layout": KvLayout(2, 4, 4, 8, torch.float32)}, 28, "is not of 2 heads of 16"),
        ({}, 27, r"slot_page must be \[27\]"),
    ],
)
def test_refuses_what_does_not_fit(changes, num_rows, message, calls):
    model = model_of(tiny_config())
    step = step_of(model, LENGTHS[0], torch.float32, pages_for(model, torch.float32))
    with pytest.raises(ConfigError, match=message):
        model(
            torch.zeros(num_rows, dtype=torch.long),
            torch.arange(num_rows),
            PagedAttention(replace(step, **changes)),
        )
    assert calls, "refused by the one call, not by a later one"


def test_refuses_adapters_of_more_rows_or_of_another_model():
    model = model_of(tiny_config())
    step = step_of(model, LENGTHS[0], torch.float32, pages_for(model, torch.float32))
    tokens, positions = torch.zeros(28, dtype=torch.long), torch.arange(28)
    more = StackedLora(lora_of(model.config, 40), model.config)
    with pytest.raises(ConfigError, match="x has 28 rows, but the segments name 40"):
        model(tokens, positions, PagedAttention(step), more)
    deeper = tiny_config(num_layers=3)
    with pytest.raises(ConfigError, match=r"must be of 8 stacks, 14 sites .*, got those of 12 stacks, 21"):
        model(tokens, positions, PagedAttention(step), StackedLora(lora_of(deeper, 28), deeper))
    batch, weights = lora_of(model.config, 28), model.native_weights()
    assert weights is not None
    rows = batch.adapters.rows
    regrouped = replace(rows, first_site=[0, 1, 4, *rows.first_site[3:]])
    with pytest.raises(ConfigError, match="must be of 8 stacks"):
        StepLora(weights, torch.zeros(1, 64, dtype=torch.uint8), regrouped, batch.segments)
    with pytest.raises(ConfigError, match=r"b_end must be \[14, 2\] torch.int32"):
        replace(rows, b_end=rows.b_end.long())


def test_stacks_that_no_adapter_touches_are_passed_over():
    model = model_of(tiny_config())
    weights = model.native_weights()
    assert weights is not None
    step = lora_of(model.config, 28, targets=("q_proj", "v_proj")).for_decoder(weights)
    assert step._stacks[:, 3].tolist() == [3, 0, 0, 0] * 2


def test_a_copy_has_addresses_of_its_own():
    model = model_of(tiny_config())
    two_steps(model, torch.float32, at_once=True, with_lora=False)
    copied = deepcopy(model)
    ours, theirs = model.native_weights(), copied.native_weights()
    assert ours is not None
    assert theirs is not None
    assert not (ours.table == theirs.table)[:, [0, 1, 2, 6, 10, 14]].any()
