"""PEFT itself as the judge: what it saves we read with its deltas, what we save it reads with ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.compose import compose
from manylora.lora.formats import load_peft, peek_peft, save_peft


class Net(nn.Module):
    """Names that trip suffix rules: "proj" at the top, "inner.proj", "0", "layers.0", dots and digits."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(8, 6), "xproj": nn.Linear(8, 6)})
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"q": nn.Linear(8, 8), "experts": nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])}
            )
            for _ in range(3)
        )
        self.conv = nn.Conv2d(3, 5, (3, 2), padding=1)
        self.conv1x1 = nn.Conv2d(5, 4, 1)


def llama():
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (Net, {"target_modules": ["q"], "r": 3, "lora_alpha": 7}),
    "suffix of several": (Net, {"target_modules": ["proj"]}),
    "rank and alpha patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {r"layers\.1\..*_proj": 3, "q_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "k_proj": 2.5},
        },
    ),
    "rslora": (Net, {"target_modules": ["q", "xproj"], "r": 3, "lora_alpha": 5, "use_rslora": True}),
    "rslora with patterns": (
        Net,
        {
            "target_modules": ["q", "xproj"],
            "r": 3,
            "use_rslora": True,
            "rank_pattern": {"q": 6, "xproj": 2},
        },
    ),
    "layers_to_transform": (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    "one layer": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "layer before expert": (
        Net,
        {"target_modules": ["0"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    ),
    "regex": (llama, {"target_modules": r".*\.[02]\.mlp\.(up|gate)_proj"}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "exclude": (
        llama,
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.1.mlp.down_proj"]},
    ),
    "exclude regex": (Net, {"target_modules": ["proj", "xproj"], "exclude_modules": r"inner\..*"}),
    "conv": (Net, {"target_modules": ["conv", "conv1x1"], "r": 2, "lora_alpha": 3}),
    "conv and linear, rslora": (Net, {"target_modules": ["conv", "q"], "use_rslora": True}),
    "gaussian": (Net, {"target_modules": ["q"], "init_lora_weights": "gaussian", "lora_dropout": 0.3}),
    "orthogonal": (Net, {"target_modules": ["q"], "init_lora_weights": "orthogonal"}),
}


def trained(name):
    """A PEFT model whose adapter has random, non-zero A and B."""
    torch.manual_seed(0)
    factory, settings = CASES[name]
    model = get_peft_model(factory(), LoraConfig(**settings))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    return model


def peft_deltas(model, adapter="default"):
    """Site to [out, in] in float64, as PEFT computes it."""
    layers = {name: layer for name, layer in model.double().named_modules() if isinstance(layer, LoraLayer)}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach().flatten(1)
        for name, layer in layers.items()
    }


def assert_same_deltas(got, want):
    assert got.keys() == want.keys()
    for site in want:
        assert want[site].abs().max() > 0.01, f"the adapter does nothing at {site}"
        torch.testing.assert_close(got[site], want[site], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves_is_read_with_its_deltas(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    adapter = load_peft(tmp_path)
    assert_same_deltas({site: pair.delta() for site, pair in adapter.sites.items()}, peft_deltas(model))
    header = peek_peft(tmp_path)
    assert header.ranks == adapter.ranks
    assert header.num_bytes == adapter.num_bytes
    assert header.dtype == adapter.dtype


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_again_peft_reads_with_the_same_deltas_at_the_same_sites(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_peft(tmp_path / "theirs")
    save_peft(adapter, tmp_path / "ours")
    assert load_peft(tmp_path / "ours").identity == adapter.identity
    again = PeftModel.from_pretrained(CASES[name][0](), tmp_path / "ours")
    assert_same_deltas(peft_deltas(again), peft_deltas(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_reads_ranks_and_scalings_that_differ_everywhere(dtype, tmp_path):
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "proj": (8, 6),
        "layers.0.q": (8, 8),
        "layers.1.q": (8, 8),
        "layers.2.experts.0": (8, 4),
        "conv": (18, 5),
    }
    sites = {
        site: LoraPair(
            torch.randn(rank, features_in, generator=generator).to(dtype),
            torch.randn(features_out, rank, generator=generator).to(dtype),
            scaling,
            (3, 2) if site == "conv" else None,
        )
        for rank, scaling, (site, (features_in, features_out)) in zip(
            [1, 2, 3, 5, 4], [0.1, -3.7, 1 / 3, 2.5, 0.02], shapes.items(), strict=True
        )
    }
    adapter = Adapter(sites)
    save_peft(adapter, tmp_path / "saved", base_model="some/model")
    again = PeftModel.from_pretrained(Net(), tmp_path / "saved")
    assert again.peft_config["default"].base_model_name_or_path == "some/model"
    assert_same_deltas(peft_deltas(again), {site: pair.delta() for site, pair in adapter.sites.items()})


def two_adapters(folder, *, use_rslora):
    """Two adapters in one PEFT model, and the same two as we read them."""
    settings = {"target_modules": ["q", "xproj"], "use_rslora": use_rslora}
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=6, **settings), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=5, lora_alpha=4, **settings))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model, [load_peft(folder / "first"), load_peft(folder / "second")]


def test_an_exact_composition_is_pefts_cat(tmp_path):
    model, parts = two_adapters(tmp_path, use_rslora=False)
    model.double().add_weighted_adapter(["first", "second"], [1.0, -0.8], "mixed", combination_type="cat")
    ours = compose(parts, [1.0, -0.8]).adapter
    assert set(ours.ranks.values()) == {3 + 5}
    for site, want in peft_deltas(model, "mixed").items():
        torch.testing.assert_close(ours.sites[site].delta(), want, rtol=0, atol=1e-6)


def test_pefts_cat_of_rank_stabilised_adapters_is_no_oracle(tmp_path):
    """PEFT gives the sum alpha = rank, which is scaling 1, but copies use_rslora: then it is sqrt(rank)."""
    model, parts = two_adapters(tmp_path, use_rslora=True)
    model.double().add_weighted_adapter(["first", "second"], [1.0, -0.8], "mixed", combination_type="cat")
    ours = compose(parts, [1.0, -0.8]).adapter
    for site, theirs in peft_deltas(model, "mixed").items():
        total = peft_deltas(model, "first")[site] - 0.8 * peft_deltas(model, "second")[site]
        torch.testing.assert_close(ours.sites[site].delta(), total, rtol=0, atol=1e-6)
        torch.testing.assert_close(theirs, (3 + 5) ** 0.5 * total, rtol=1e-6, atol=1e-6)
