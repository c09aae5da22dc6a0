import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.errors import ModelError
from manylora.kernels.native import tiles
from manylora.lora.adapter import Adapter
from manylora.models.config import LlamaConfig
from manylora.models.dense_attention import DenseAttention
from manylora.models.layers import BaseProduct
from manylora.models.llama import Llama
from manylora.models.loading import build_model
from manylora.models.rope import RopeConfig, Rotation, inverse_frequencies
from manylora.models.sites import Stack, base_sites, site_name, stack_shape
from manylora.models.tiny import save_tiny, tiny_adapter, tiny_config, tiny_model, tiny_weights
from tests.models.oracle import our_logits, their_logits, transformers_model, with_exact_norms

LLAMA3_ROPE = RopeConfig(
    theta=500.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=64,
)

CONFIGS = {
    "llama": tiny_config(),
    "llama, tied": tiny_config(tie_embeddings=True),
    "llama, biases": tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama, as many kv heads": tiny_config(num_kv_heads=4),
    "llama, one kv head": tiny_config(num_kv_heads=1),
    "llama, head_dim of its own": tiny_config(head_dim=8),
    "llama, llama3 rope": tiny_config(rope=LLAMA3_ROPE),
    "llama, linear rope": tiny_config(rope=RopeConfig(kind="linear", factor=4.0)),
    "mistral": tiny_config("mistral"),
    "qwen2": tiny_config("qwen2"),
    "qwen2, untied": tiny_config("qwen2", tie_embeddings=False),
    "qwen3": tiny_config("qwen3"),
    "qwen3, biases": tiny_config("qwen3", qkv_bias=True, o_bias=True),
}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 257, (100,))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, tmp_path, tokens):
    config = CONFIGS[name]
    directory = save_tiny(tmp_path / "model", config)

    ours = our_logits(tiny_model(config), tokens)
    theirs = their_logits(transformers_model(directory), tokens)

    assert theirs.std() > 1
    assert (ours - theirs).abs().max() < 1e-4
    ours_exact = our_logits(tiny_model(config, dtype="float64"), tokens)
    exact = their_logits(with_exact_norms(transformers_model(directory, torch.float64)), tokens)
    assert ours_exact.dtype == torch.float64
    assert (ours_exact - exact).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_half_precision_errs_no_more_than_transformers(name, dtype, tmp_path, tokens):
    config = CONFIGS[name]
    exact = our_logits(tiny_model(config, dtype="float64"), tokens)
    directory = save_tiny(tmp_path / "model", config)

    ours = our_logits(tiny_model(config, dtype=dtype), tokens)
    theirs = their_logits(transformers_model(directory, dtype), tokens)

    assert ours.dtype == torch.float32
    our_error, their_error = ((logits.double() - exact).std() for logits in (ours, theirs))
    assert 0 < our_error < 1.25 * their_error


def test_the_settings_that_set_members_apart_change_the_logits(tokens):
    """Else the comparison above would hold for a decoder that ignores them."""
    weights = tiny_weights(tiny_config())
    base = our_logits(build_model(tiny_config(), weights.items()), tokens)
    for changes in (
        {"rope": LLAMA3_ROPE},
        {"rope": RopeConfig(theta=500.0)},
        {"rope": RopeConfig(kind="linear", factor=4.0)},
        {"rms_norm_eps": 0.1},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32},
    ):
        changed = our_logits(build_model(tiny_config(**changes), weights.items()), tokens)
        assert (changed - base).abs().max() > 0.1, changes


def test_sequences_side_by_side_give_what_each_gives_alone(tokens):
    model = tiny_model()
    lengths = [1, 40, 7, 52]
    attention = DenseAttention(lengths, scale=model.config.attention_scale)

    together = model(tokens, attention.positions, attention)

    alone = torch.cat([our_logits(model, part) for part in torch.split(tokens, lengths)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, our_logits(model, tokens), atol=0.1)


def test_logits_are_those_of_the_rows_asked_for(tokens):
    model = tiny_model()
    attention = DenseAttention([len(tokens)], scale=model.config.attention_scale)
    rows = torch.tensor([99, 3, 3])

    some = model(tokens, attention.positions, attention, logit_rows=rows)

    everything = our_logits(model, tokens)
    assert torch.allclose(some, everything[rows], atol=1e-5)
    assert model(tokens, attention.positions, attention, logit_rows=rows[:0]).shape == (0, 257)


def test_logits_do_not_depend_on_where_the_positions_begin(tokens):
    model = tiny_model(dtype="float64")
    attention = DenseAttention([len(tokens)], scale=model.config.attention_scale)

    shifted = model(tokens, attention.positions + 300, attention)

    # Angles are fp32 by definition, so a shift is exact up to their rounding at position 400.
    assert torch.allclose(shifted, our_logits(model, tokens), atol=1e-3)


class MergedBeside:
    """A LoraHook that adds dense deltas, and notes how it was called."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.calls: list[tuple[int, Stack]] = []

    def shrink_expand(self, layer: int, stack: Stack, x: Tensor, y: Tensor) -> None:
        assert x.is_contiguous()
        assert y.is_contiguous()
        self.calls.append((layer, stack))
        deltas = [self.adapter.sites[site_name(layer, member)].delta(x.dtype) for member in stack.members]
        y += x @ torch.cat(deltas).T


@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3"])
def test_the_hook_gives_what_merged_weights_give(name, tokens):
    config = CONFIGS[name]
    adapter = tiny_adapter(config)
    weights = tiny_weights(config)
    merged = {key: tensor.clone() for key, tensor in weights.items()}
    for site, pair in adapter.sites.items():
        merged[f"{site}.weight"] += pair.delta(torch.float32)
    hook = MergedBeside(adapter)

    beside = our_logits(build_model(config, weights.items(), dtype="float64"), tokens, hook)

    inside = our_logits(build_model(config, merged.items(), dtype="float64"), tokens)
    assert (inside - our_logits(tiny_model(config, dtype="float64"), tokens)).abs().max() > 1
    assert (beside - inside).abs().max() < 1e-4
    assert hook.calls == [(layer, stack) for layer in range(config.num_layers) for stack in Stack]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_sites_are_the_linears_of_transformers(name, tmp_path):
    config = CONFIGS[name]
    model = transformers_model(save_tiny(tmp_path / "model", config))

    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }

    assert base_sites(config) == linears


def test_stack_columns_lie_side_by_side_in_order():
    shape = stack_shape(tiny_config("qwen3"), Stack.QKV)
    assert shape.columns == ((0, 96), (96, 144), (144, 192))
    assert (shape.in_features, shape.out_features) == (64, 192)


def test_llama3_rope_keeps_short_waves_and_stretches_long_ones():
    plain = inverse_frequencies(RopeConfig(theta=500.0), 64)
    scaled = inverse_frequencies(LLAMA3_ROPE, 64)

    turns = 64 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    assert torch.equal(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_a_rotation_keeps_lengths_and_turns_by_the_difference_of_positions():
    frequencies = inverse_frequencies(RopeConfig(), 16)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def dot(q_position: int, k_position: int) -> float:
        turned = [
            Rotation.at(torch.tensor([position]), frequencies, torch.float64).apply_(vector.clone())
            for vector, position in ((q, q_position), (k, k_position))
        ]
        assert torch.allclose(turned[0].norm(), q.norm())
        return float((turned[0] * turned[1]).sum())

    assert dot(9, 4) == pytest.approx(dot(25, 20), abs=1e-5)
    assert abs(dot(9, 4) - dot(9, 5)) > 1e-2


def filled_product(*, dtype: torch.dtype = torch.float32, bias: bool = True) -> BaseProduct:
    product = BaseProduct(96, 257, bias=bias, dtype=dtype, device=torch.device("cpu"))
    for tensor in (product.weight, product.bias):
        if tensor is not None:
            tensor.normal_()
    return product


TILES = pytest.param(
    True, marks=pytest.mark.skipif(not tiles.is_available(), reason="this processor has no tiles")
)


@pytest.fixture(params=[False, TILES], ids=["plain", "tiles"])
def in_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a processor with tiles, and as on one without."""
    if not request.param:
        monkeypatch.setattr(tiles, "is_available", lambda: False)
    return bool(request.param)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_laid_out_is_the_product(bias, in_tiles):
    product = filled_product(bias=bias)
    weight, x = product.dense_weight().clone(), torch.randn(50, 96)

    product.finish()

    assert product.implementation == ("tiles" if in_tiles else "onednn")
    assert product.weight is None
    assert torch.equal(product.dense_weight(), weight)
    want = F.linear(
        x.double(), weight.double(), product.bias.double() if product.bias is not None else None
    )
    assert torch.allclose(product(x).double(), want, atol=1e-4)
    assert product(x[:0]).shape == (0, 257)


def test_a_row_of_a_product_laid_out_does_not_depend_on_its_batch(in_tiles):
    product = filled_product()
    product.finish()
    x = torch.randn(70, 96)
    whole = product(x)
    for num_rows in (2, 3, 16, 33):
        assert torch.equal(product(x[:num_rows]), whole[:num_rows])
    assert torch.allclose(product(x[:1]), whole[:1], atol=1e-4)
    if in_tiles:  # else one row alone may be summed in another order
        assert torch.equal(product(x[:1]), whole[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_as_they_are(dtype):
    product = filled_product(dtype=dtype)
    product.finish()
    assert product.implementation == "torch"
    assert product.weight is not None


def test_an_integer_product_keeps_its_rounded_weight_only(in_tiles):
    product = filled_product()
    weight, x = product.dense_weight().clone(), torch.randn(50, 96)

    product.finish(int8=True)

    assert product.implementation == ("tiles" if in_tiles else "int8")
    assert product.weight is None
    rounded = product.dense_weight()
    assert 0 < (rounded - weight).abs().max() < 0.02 * weight.abs().max()
    want = F.linear(x, rounded, product.bias)
    error = (product(x) - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0 < error < (1e-5 if in_tiles else 0.02)  # without tiles, activations are rounded too
    with pytest.raises(ModelError, match="load it again with the device and dtype"):
        product.to(torch.float64)


def test_a_loaded_model_says_that_it_stays_where_it_is():
    with pytest.raises(ModelError, match="load it again with the device and dtype"):
        tiny_model().to(torch.float64)


def test_the_embedding_is_shared_with_a_tied_output():
    model = tiny_model(tiny_config(tie_embeddings=True))
    assert torch.equal(model.output.dense_weight(), model.embedding)
    assert model.output.dense_weight().data_ptr() == model.embedding.data_ptr()
    for layer in range(2):
        assert all(model.base_product(layer, stack).weight is None for stack in Stack)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number"),
        ({"num_kv_heads": 3}, "num_heads 4 is no multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "values",
    [{"theta": 0.0}, {"kind": "linear", "factor": 0.0}, {"kind": "llama3", "low_freq_factor": 4.0}],
)
def test_a_rope_that_cannot_be_is_refused(values):
    with pytest.raises(ModelError, match=r"rope.* needs"):
        RopeConfig(**values)


def test_config_and_device_are_what_was_asked_for():
    config: LlamaConfig = tiny_config("qwen3")
    model: Llama = tiny_model(config, dtype="bfloat16")
    assert (model.config, model.dtype, model.device.type) == (config, torch.bfloat16, "cpu")
    assert config.attention_scale == pytest.approx(24**-0.5)
