import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora.errors import ModelError
from manylora.models.hf_config import FAMILIES
from manylora.models.loading import load_model
from manylora.models.sites import base_sites
from manylora.models.tiny import (
    TINY_END,
    save_tiny,
    tiny_adapter,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tiny_weights,
)
from tests.models.oracle import our_logits


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert list(first) == list(second)
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_follow_from_config_and_seed(model_type):
    config = tiny_config(model_type)
    assert differences(tiny_weights(config), tiny_weights(config)) == []
    assert differences(tiny_weights(config), tiny_weights(config, seed=1)) == list(tiny_weights(config))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_spread_and_every_layer_matters(model_type):
    config = tiny_config(model_type)
    tokens = torch.randint(0, 257, (200,))
    logits = our_logits(tiny_model(config), tokens)
    best, second = logits.topk(2).values.unbind(-1)

    assert 2 < logits.std() < 5
    assert (best - second).median() > 0.3
    assert len(logits.argmax(-1).unique()) > 50
    shallow = our_logits(tiny_model(tiny_config(model_type, num_layers=1)), tokens)
    assert (shallow.argmax(-1) != logits.argmax(-1)).float().mean() > 0.3


TOKENIZER = tiny_tokenizer()


@given(st.text())
@settings(deadline=None, max_examples=100)
def test_token_ids_are_the_bytes_of_the_text(text):
    ids = TOKENIZER(text.replace(TINY_END, "")).input_ids
    assert bytes(ids).decode() == text.replace(TINY_END, "")
    assert TOKENIZER.decode(ids) == text.replace(TINY_END, "")


def test_the_end_token_is_one_token_and_is_not_shown():
    config = tiny_config()
    assert config.eos_token_ids == (TOKENIZER.eos_token_id,) == (256,)
    assert len(TOKENIZER) == config.vocab_size
    ids = TOKENIZER("a" + TINY_END).input_ids
    assert ids == [97, 256]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "a"


def test_a_saved_tiny_model_is_the_tiny_model(tmp_path):
    config = tiny_config("qwen3")
    directory = save_tiny(tmp_path / "deep" / "model", config, seed=3)
    tokens = torch.arange(100)
    assert torch.equal(
        our_logits(load_model(directory), tokens), our_logits(tiny_model(config, seed=3), tokens)
    )
    assert [path.name for path in directory.parent.iterdir()] == ["model"]
    with pytest.raises(ModelError, match="exists already; name a new directory"):
        save_tiny(directory)


def test_adapters_fit_and_change_the_model():
    config = tiny_config("qwen3")
    adapter = tiny_adapter(config, dtype=torch.bfloat16, name="a")
    adapter.validate()
    assert {
        site: (pair.in_features, pair.out_features) for site, pair in adapter.sites.items()
    } == base_sites(config)
    weights = tiny_weights(config)
    for site, pair in adapter.sites.items():
        ratio = pair.delta().norm() / weights[f"{site}.weight"].norm()
        assert 0.2 < ratio < 0.5
    assert adapter.identity == tiny_adapter(config, dtype=torch.bfloat16).identity
    assert adapter.identity != tiny_adapter(config, dtype=torch.bfloat16, seed=1).identity


def test_ranks_and_targets_are_those_asked_for():
    config = tiny_config()
    some = tiny_adapter(config, rank=3, targets=["q_proj", "down_proj"])
    assert set(some.sites) == {
        f"model.layers.{i}.{site}" for i in (0, 1) for site in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert set(some.ranks.values()) == {3}
    mixed = tiny_adapter(config, rank={"v_proj": 1, "up_proj": 9})
    assert mixed.ranks == {
        f"model.layers.{i}.{site}": rank
        for i in (0, 1)
        for site, rank in (("self_attn.v_proj", 1), ("mlp.up_proj", 9))
    }
