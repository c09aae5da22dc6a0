"""GGUF files of the llama architecture (Llama, Mistral, SmolLM): config and dequantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manylora.errors import ModelError
from manylora.models.config import LlamaConfig
from manylora.models.gguf_file import GgufFile
from manylora.models.rope import RopeConfig
from manylora.models.sites import site_name

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_USED_KEYS = frozenset(
    "block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv "
    "attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.freq_base "
    "rope.dimension_count rope.scaling.type rope.scaling.factor vocab_size".split()
)


class GgufModel:
    """One opened file of the llama architecture."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.name = name
        self._file = GgufFile(path)
        self.config = self._config()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name as in transformers, fp32 tensor) of every weight, dequantised when its turn comes."""
        for name, values in self._file.tensors():
            if ".attn_q." in name:
                values = _unpermute(values, self.config.num_heads)
            elif ".attn_k." in name:
                values = _unpermute(values, self.config.num_kv_heads)
            # Unquantised tensors come as read-only views of the mapped file, which torch warns about.
            values = np.require(values, dtype=np.float32, requirements=["C", "W"])
            yield self._hf_name(name), torch.from_numpy(values)

    def _config(self) -> LlamaConfig:
        architecture = self._file.metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelError(
                f"model '{self.name}': GGUF architecture {architecture!r} is not served; accepted: llama "
                "(other families as a transformers directory)"
            )
        self._refuse_unknown_keys()
        num_heads, hidden_size = self._required("attention.head_count"), self._required("embedding_length")
        head_dim = self._get("attention.key_length") or hidden_size // num_heads
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._get(key) not in (None, head_dim):
                raise ModelError(
                    f"model '{self.name}': llama.{key} is {self._get(key)}, served only where it is the "
                    f"head's size, {head_dim}"
                )
        tensor_names = self._file.tensor_names
        if "rope_freqs.weight" in tensor_names:
            raise ModelError(
                f"model '{self.name}': rope_freqs.weight (Llama 3.1's rope scaling, as a tensor) is not read from "
                "GGUF; use the model's transformers directory"
            )
        return LlamaConfig(
            name=self.name,
            vocab_size=self._get("vocab_size") or len(self._required_field("tokenizer.ggml.tokens")),
            hidden_size=hidden_size,
            intermediate_size=self._required("feed_forward_length"),
            num_layers=self._required("block_count"),
            num_heads=num_heads,
            num_kv_heads=self._get("attention.head_count_kv") or num_heads,
            head_dim=head_dim,
            rms_norm_eps=_shortest(self._required("attention.layer_norm_rms_epsilon")),
            max_position=self._required("context_length"),
            rope=self._rope(),
            tie_embeddings="output.weight" not in tensor_names,
            qkv_bias="blk.0.attn_q.bias" in tensor_names,
            o_bias="blk.0.attn_output.bias" in tensor_names,
            bos_token_id=self._file.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=self._eos_token_ids(),
        )

    def _rope(self) -> RopeConfig:
        theta = _shortest(self._get("rope.freq_base") or 10000.0)
        kind = self._get("rope.scaling.type") or "none"
        if kind == "none":
            return RopeConfig(theta=theta)
        if kind == "linear":
            return RopeConfig(
                theta=theta, kind="linear", factor=_shortest(self._required("rope.scaling.factor"))
            )
        raise ModelError(
            f"model '{self.name}': rope scaling {kind!r} is not read from GGUF; accepted: none, linear"
        )

    def _eos_token_ids(self) -> tuple[int, ...]:
        ids = (self._file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
        return tuple(dict.fromkeys(int(token_id) for token_id in ids if token_id is not None))

    def _refuse_unknown_keys(self) -> None:
        keys = [key.removeprefix("llama.") for key in self._file.metadata if key.startswith("llama.")]
        refused = {
            f"llama.{key}": self._get(key) for key in keys if key not in _USED_KEYS and self._get(key)
        }
        if refused:
            raise ModelError(
                f"model '{self.name}': the GGUF asks for what the decoder does not compute: {refused}"
            )

    def _get(self, key: str) -> Any:
        return self._file.metadata.get(f"llama.{key}")

    def _required(self, key: str) -> Any:
        return self._required_field(f"llama.{key}")

    def _required_field(self, key: str) -> Any:
        value = self._file.metadata.get(key)
        if value is None:
            raise ModelError(f"model '{self.name}': the GGUF lacks {key}")
        return value

    def _hf_name(self, name: str) -> str:
        """The name in transformers; an unknown name is returned as it is, for the loader to refuse."""
        module, _, kind = name.rpartition(".")
        if module in _MODEL_TENSORS:
            return f"{_MODEL_TENSORS[module]}.{kind}"
        prefix, _, module = module.rpartition(".")
        layer = prefix.removeprefix("blk.")
        if layer.isdigit() and module in _LAYER_TENSORS:
            return site_name(int(layer), f"{_LAYER_TENSORS[module]}.{kind}")
        return name


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:  # [num_heads * HD, D] or [num_heads * HD]
    """Undo GGUF's order of a head's rows: it puts channels that rotate together next to each other."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32: the file's 9.99999974e-06 was 1e-5 in the config it was made from."""
    return float(str(np.float32(value)))
