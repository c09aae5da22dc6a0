"""config.json of transformers <-> LlamaConfig. Every key is used, known to change nothing here, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manylora.errors import ModelError
from manylora.models.config import LlamaConfig
from manylora.models.rope import RopeConfig


@dataclass(frozen=True)
class _Family:
    architecture: str
    extra_keys: frozenset[str] = frozenset()
    """Keys beyond the common ones that this architecture's computation reads."""


FAMILIES = {
    "llama": _Family("LlamaForCausalLM", frozenset({"attention_bias", "mlp_bias"})),
    "mistral": _Family("MistralForCausalLM", frozenset({"sliding_window"})),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}),
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        frozenset(
            {"attention_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
        ),
    ),
}

_USED_KEYS = frozenset(
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings hidden_act "
    "rope_theta rope_scaling rope_parameters bos_token_id eos_token_id".split()
)

# Keys that say where the file came from, how the model was trained, or what transformers should return.
_KEYS_WITHOUT_EFFECT = frozenset(
    # pretraining_tp splits a product into parts whose sum it is.
    "_name_or_path name_or_path transformers_version torch_dtype dtype use_cache initializer_range pad_token_id "
    "sep_token_id decoder_start_token_id attention_dropout pretraining_tp tokenizer_class task_specific_params "
    "_attn_implementation _attn_implementation_autoset attn_implementation is_llama_config "
    "transformers.js_config unsloth_version unsloth_fixed id2label label2id problem_type return_dict "
    "output_attentions output_hidden_states is_encoder_decoder chunk_size_feed_forward "
    "max_length min_length temperature top_k top_p typical_p num_beams repetition_penalty length_penalty".split()
)

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def config_from_hf(values: Mapping[str, Any], *, name: str = "") -> LlamaConfig:
    """Return the LlamaConfig that the content of a config.json means.

    Raises:
        ModelError: an architecture not in FAMILIES, a key that is missing, or a key or value that asks for a
            computation which the decoder does not do; names it.
    """
    label = f"model '{name}'" if name else "the model"
    family_name = _family_of(values, label)
    _refuse_unknown_keys(values, family_name, label)
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"{label}: hidden_act {values['hidden_act']!r} is not served; accepted: silu")

    hidden_size, num_heads = (
        _required(values, key, label) for key in ("hidden_size", "num_attention_heads")
    )
    head_dim = values.get("head_dim") or (
        _required(values, "head_dim", label) if family_name == "qwen3" else None
    )
    if not head_dim and hidden_size % num_heads:
        raise ModelError(
            f"{label}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}"
        )
    max_position = _required(values, "max_position_embeddings", label)
    window = _sliding_window(values, family_name, label)
    attention_bias = bool(values.get("attention_bias"))
    return LlamaConfig(
        model_type=family_name,
        name=name,
        vocab_size=_required(values, "vocab_size", label),
        hidden_size=hidden_size,
        intermediate_size=_required(values, "intermediate_size", label),
        num_layers=_required(values, "num_hidden_layers", label),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(values, family_name, num_heads, label),
        head_dim=head_dim or hidden_size // num_heads,
        rms_norm_eps=_required(values, "rms_norm_eps", label),
        # A window as long as the sequence hides nothing, so up to its length the model is served exactly.
        max_position=max_position if window is None else min(max_position, window),
        rope=_rope(values, max_position, label),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family_name == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(values.get("mlp_bias")),
        qk_norm=family_name == "qwen3",
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=_token_ids(values.get("eos_token_id")),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Return the config.json content that transformers reads as this model; config_from_hf gives the config back."""
    values: dict[str, Any] = {
        "architectures": [FAMILIES[config.model_type].architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _rope_to_hf(config.rope),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }
    extra_keys = FAMILIES[config.model_type].extra_keys
    if "attention_bias" in extra_keys:
        values["attention_bias"] = config.o_bias
    if "mlp_bias" in extra_keys:
        values["mlp_bias"] = config.mlp_bias
    if "sliding_window" in extra_keys:
        values["sliding_window"] = None
    return values


def _family_of(values: Mapping[str, Any], label: str) -> str:
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = values.get("architectures") or []
    stated = str(architectures[0] if architectures else values.get("model_type"))
    family_name = by_architecture.get(stated, stated if not architectures else None)
    if family_name not in FAMILIES:
        raise ModelError(
            f"{label}: architecture {stated!r} is not served; accepted: {', '.join(sorted(by_architecture))}"
        )
    return family_name


def _refuse_unknown_keys(values: Mapping[str, Any], family_name: str, label: str) -> None:
    known = _USED_KEYS | _KEYS_WITHOUT_EFFECT | FAMILIES[family_name].extra_keys
    # null, false, 0 and empty mean "off" for a key that switches something on.
    refused = {key: value for key, value in values.items() if key not in known and value}
    if refused:
        settings = ", ".join(f"{key} = {value!r}" for key, value in sorted(refused.items()))
        raise ModelError(
            f"{label}: config.json asks for what the decoder does not compute, or does not know: {settings}. "
            "A key that changes nothing in the computation can be removed from config.json."
        )


def _required(values: Mapping[str, Any], key: str, label: str) -> Any:
    if values.get(key) is None:
        raise ModelError(f"{label}: config.json lacks {key}")
    return values[key]


def _num_kv_heads(values: Mapping[str, Any], family_name: str, num_heads: int, label: str) -> int:
    # The first Llama files are older than grouped-query attention and have no such key.
    if family_name == "llama" and values.get("num_key_value_heads") is None:
        return num_heads
    return int(_required(values, "num_key_value_heads", label))


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Return the ids of a config entry that holds none, one or several."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _sliding_window(values: Mapping[str, Any], family_name: str, label: str) -> int | None:
    """The window in tokens if some layer uses one, else None."""
    layer_types = values.get("layer_types") or []
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown and "layer_types" in FAMILIES[family_name].extra_keys:
        raise ModelError(f"{label}: layer_types {sorted(unknown)} are not served; accepted: full_attention")
    if family_name == "mistral":
        # A Mistral config that says nothing means 4096; null means none.
        window: int | None = values.get("sliding_window", 4096)
        return window
    if not values.get("use_sliding_window"):
        return None
    # Without layer_types, the layers from max_window_layers on use the window.
    num_full = values.get("max_window_layers", 28)
    uses_window = (
        "sliding_attention" in layer_types if layer_types else values["num_hidden_layers"] > num_full
    )
    return int(_required(values, "sliding_window", label)) if uses_window else None


def _rope(values: Mapping[str, Any], max_position: int, label: str) -> RopeConfig:
    # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling.
    settings = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = settings.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    kinds = {settings.pop(key) for key in ("rope_type", "type") if settings.get(key) is not None} or {
        "default"
    }
    kind = kinds.pop()
    if kinds or kind not in _ROPE_KEYS:
        raise ModelError(
            f"{label}: rope type {kind!r} is not served; accepted: {', '.join(_ROPE_KEYS)}"
            + (f" (config.json also says {kinds.pop()!r})" if kinds else "")
        )
    needed = _ROPE_KEYS[kind]
    if settings.get("partial_rotary_factor") == 1:
        del settings["partial_rotary_factor"]
    unknown = {key: value for key, value in settings.items() if key not in needed and value is not None}
    if unknown:
        raise ModelError(
            f"{label}: rope type {kind!r} knows {list(needed)}, config.json has also {unknown}"
        )
    missing = [key for key in needed if settings.get(key) is None]
    if missing:
        raise ModelError(f"{label}: rope type {kind!r} needs {missing}, which config.json lacks")
    return RopeConfig(
        theta=theta, kind=kind, **{_ROPE_FIELDS.get(key, key): settings[key] for key in needed}
    )


_ROPE_FIELDS = {"original_max_position_embeddings": "original_max_position"}


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    return values | {key: getattr(rope, _ROPE_FIELDS.get(key, key)) for key in _ROPE_KEYS[rope.kind]}
