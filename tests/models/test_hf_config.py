from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import ModelError
from manylora.models.config import LlamaConfig
from manylora.models.hf_config import FAMILIES, config_from_hf, config_to_hf
from manylora.models.rope import RopeConfig
from manylora.models.tiny import tiny_config


def hf_values(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return config_to_hf(tiny_config(family)) | changes


# What published config.json files say, shortened to what matters to the decoder and to the refusal of unknown keys.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SmolLM2-135M-Instruct": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
            "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3",
            "use_cache": True, "vocab_size": 49152,
        },
        {"head_dim": 64, "tie_embeddings": True, "max_position": 8192, "rope": RopeConfig(theta=100000.0)},
    ),
    "Llama-3.2-1B-Instruct": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        {
            "eos_token_ids": (128001, 128008, 128009), "max_position": 131072, "qkv_bias": False,
            "rope": RopeConfig(theta=500000.0, kind="llama3", factor=32.0),
        },
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"head_dim": 128, "max_position": 4096, "tie_embeddings": False},
    ),
    "Qwen2.5-0.5B-Instruct": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
            "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
            "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        {"qkv_bias": True, "o_bias": False, "qk_norm": False, "head_dim": 64, "max_position": 32768},
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
            "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
        },
        {"qkv_bias": False, "qk_norm": True, "head_dim": 128, "rms_norm_eps": 1e-06},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    values, want = PUBLISHED[name]
    config = config_from_hf(values, name=name)
    assert {field: getattr(config, field) for field in want} == want


ROPES = st.one_of(
    st.builds(RopeConfig, theta=st.sampled_from([10000.0, 500000.0])),
    st.builds(RopeConfig, kind=st.just("linear"), factor=st.floats(1, 16)),
    st.builds(
        RopeConfig,
        kind=st.just("llama3"),
        factor=st.floats(1, 32),
        low_freq_factor=st.floats(0.5, 1.5),
        high_freq_factor=st.floats(2, 8),
        original_max_position=st.integers(16, 8192),
    ),
)


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    model_type = draw(st.sampled_from(sorted(FAMILIES)))
    attention_bias = draw(st.booleans()) if model_type in ("llama", "qwen3") else False
    return tiny_config(
        model_type,
        rope=draw(ROPES),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=draw(st.booleans()) if model_type == "llama" else False,
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([8, 16, 40])),
        bos_token_id=draw(st.none() | st.integers(0, 256)),
        eos_token_ids=draw(st.lists(st.integers(0, 256), max_size=3, unique=True).map(tuple)),
    )


@given(configs())
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_read_back(config):
    assert config_from_hf(config_to_hf(config), name=config.name) == config


def test_rope_is_read_in_the_notation_of_every_transformers():
    values = hf_values()
    del values["rope_parameters"]
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    want = RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position=64)

    assert config_from_hf(values).rope == RopeConfig(theta=10000.0)
    assert config_from_hf(values | {"rope_theta": 1e6, "rope_scaling": None}).rope == RopeConfig(theta=1e6)
    for old in ("type", "rope_type"):
        assert (
            config_from_hf(values | {"rope_theta": 5e5, "rope_scaling": scaling | {old: "llama3"}}).rope
            == want
        )
    parameters = scaling | {"rope_type": "llama3", "rope_theta": 5e5, "partial_rotary_factor": 1.0}
    assert config_from_hf(values | {"rope_parameters": parameters}).rope == want


def test_old_llama_files_have_as_many_kv_heads_as_heads():
    values = hf_values()
    del values["num_key_value_heads"], values["head_dim"]
    config = config_from_hf(values)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)


def test_an_architecture_may_be_named_by_model_type_alone():
    values = hf_values("qwen2")
    del values["architectures"]
    assert config_from_hf(values).model_type == "qwen2"


def test_keys_that_change_nothing_are_accepted():
    harmless: dict[str, Any] = {
        "pretraining_tp": 2,
        "_name_or_path": "x",
        "use_cache": True,
        "attention_dropout": 0.1,
    }
    switched_off: dict[str, Any] = {
        "rope_interleaved": False,
        "quantization_config": None,
        "use_mrope": False,
    }
    assert config_from_hf(hf_values(**harmless, **switched_off)) == config_from_hf(hf_values())


@pytest.mark.parametrize(
    ("model_type", "changes", "max_position"),
    [
        ("mistral", {"sliding_window": None}, 512),
        ("mistral", {"sliding_window": 4096}, 512),
        ("mistral", {"sliding_window": 100}, 100),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, 512),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}, 512),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}, 100),
        (
            "qwen3",
            {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
            512,
        ),
        (
            "qwen3",
            {
                "sliding_window": 100,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            100,
        ),
    ],
)
def test_sequences_are_no_longer_than_an_active_sliding_window(model_type, changes, max_position):
    assert config_from_hf(hf_values(model_type, **changes)).max_position == max_position


def test_a_mistral_that_says_nothing_has_a_window_of_4096():
    values = hf_values("mistral", max_position_embeddings=32768)
    del values["sliding_window"]
    assert config_from_hf(values).max_position == 4096


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "llama",
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture 'GPT2LMHeadModel' is not served; accepted: Llama",
        ),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            "'LlamaForSequenceClassification' is not",
        ),
        ("llama", {"architectures": [], "model_type": "gemma2"}, "architecture 'gemma2' is not served"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not served; accepted: silu"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {"embedding_multiplier": 12}, "embedding_multiplier"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "custom.Model"}}, "auto_map"),
        ("llama", {"sliding_window": 128}, "sliding_window = 128"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        (
            "qwen3",
            {"layer_types": ["linear_attention"] * 2},
            "layer_types .'linear_attention'. are not served",
        ),
        ("llama", {"rms_norm_eps": None}, "lacks rms_norm_eps"),
        ("llama", {"vocab_size": None}, "lacks vocab_size"),
        ("qwen2", {"num_key_value_heads": None}, "lacks num_key_value_heads"),
        ("qwen3", {"head_dim": None}, "lacks head_dim"),
        (
            "llama",
            {"head_dim": None, "hidden_size": 66},
            "hidden_size 66 is no multiple of num_attention_heads 4",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not served",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
            "accepted: default, linear, llama3",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear"}},
            "needs .'factor'., which config.json lacks",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 8]}},
            "has also {'mrope_section'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "linear"}},
            "is not served",
        ),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(model_type, changes, message):
    config_from_hf(hf_values(model_type))
    with pytest.raises(ModelError, match=message):
        config_from_hf(hf_values(model_type, **changes), name="some-model")
