"""Small GGUF files of the llama architecture, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from manylora.models.config import LlamaConfig
from manylora.models.tiny import TINY_END, tiny_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    *,
    quantise: gguf.GGMLQuantizationType | None = None,
    metadata: Mapping[str, str | int | float] | None = None,
    pre: str | None = "smollm",
    extra_tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write `weights` (named as in transformers), matrices quantised if asked, with a small vocabulary.

    pre: how the byte-level vocabulary splits text; None: a sentencepiece vocabulary.
    metadata: values added to, or in place of, the usual ones.
    """
    writer = gguf.GGUFWriter(path, "llama")
    usual: dict[str, str | int | float] = {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope.theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    }
    for key, value in (usual | dict(metadata or {})).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    if pre is None:
        _add_sentencepiece(writer)
    else:
        _add_byte_level(writer, pre)
    for name, tensor in weights.items():
        values = _permuted(name, tensor.numpy(), config)
        if quantise is not None and values.ndim == 2:
            packed = gguf.quants.quantize(values, quantise)
            writer.add_tensor(_gguf_name(name), packed, raw_dtype=quantise)
        else:
            writer.add_tensor(_gguf_name(name), values)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_byte_level(writer: gguf.GGUFWriter, pre: str) -> None:
    vocab = tiny_tokenizer().get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    merged = ["ĠĠ", "ĊĊ", "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *merged])
    writer.add_token_types([1] * 256 + [3] + [1] * len(merged))
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ", "1 2"])
    writer.add_eos_token_id(vocab[TINY_END])
    writer.add_bos_token_id(vocab[TINY_END])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}")


def _add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    pieces = ["▁", "a", "b", "▁a", "ab", "▁ab", "1", "2"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, _, layer, member = module.split(".", 3)
    return f"blk.{layer}.{NAMES[member]}.{kind}"


def _permuted(name: str, values: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Row 2 i + s of a head is row i + s * half of transformers': channels that turn together lie together."""
    num_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if num_heads is None:
        return values
    half = config.head_dim // 2
    order = [
        head * config.head_dim + i + s * half
        for head in range(num_heads)
        for i in range(half)
        for s in range(2)
    ]
    return np.ascontiguousarray(values[order])
