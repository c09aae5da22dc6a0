"""Models and adapters as llama.cpp reads them: GGUF, the weights those that everybody has.

llama.cpp's own converters begin from transformers' files and need that library beside them; ours begin from the GGUF
that is served, and from the adapter.
"""

# Shapes: R rank, D in-features, O out-features, H heads, HD channels of a head.

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

from manylora.errors import ConfigError
from manylora.lora.formats import load_peft
from manylora.models.config import LlamaConfig
from manylora.models.gguf_file import GgufFile

KINDS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

_SITE = re.compile(r"model\.layers\.(\d+)\.(.+)")

_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_model(source: Path, target: Path, kind: str) -> None:
    """Write the model of a GGUF file again with every matrix in one format, "f32" or "q8_0"; norms stay float32."""
    matrix_type, file_type = KINDS[kind]
    fields = gguf.GGUFReader(source).fields
    writer = gguf.GGUFWriter(target, fields["general.architecture"].contents())
    for name, field in fields.items():
        # The writer writes the first of these itself.
        if name != "general.architecture" and not name.startswith("GGUF.") and name != "general.file_type":
            kinds = field.types
            writer.add_key_value(
                name, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None
            )
    writer.add_file_type(file_type)
    for name, values in GgufFile(source).tensors():
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.ndim == 1 or matrix_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, matrix_type), raw_dtype=matrix_type)
    _write(writer)


def write_adapter(folder: Path, target: Path, config: LlamaConfig) -> None:
    """Write a PEFT directory as GGUF, in float32: what ggml multiplies fastest, and every value of bfloat16 exactly.

    Raises:
        ConfigError: a site that a GGUF of the llama architecture has no name for.
    """
    adapter = load_peft(folder)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # Scalings may differ by site, and llama.cpp knows one alpha: no alpha, and the scaling within B.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for site, pair in adapter.sites.items():
        lora_a, lora_b = pair.lora_a.float().numpy(), (pair.scaling * pair.lora_b.float()).numpy()
        name = _tensor_name(site)
        if name.endswith("attn_q"):
            lora_b = _permute(lora_b, config.num_heads)
        elif name.endswith("attn_k"):
            lora_b = _permute(lora_b, config.num_kv_heads)
        writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(lora_a))  # [R, D]
        writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(lora_b))  # [O, R]
    _write(writer)


def _tensor_name(site: str) -> str:
    match = _SITE.fullmatch(site)
    if match is None or match[2] not in _TENSORS:
        raise ConfigError(f"site '{site}' has no name in a GGUF of the llama architecture")
    return f"blk.{match[1]}.{_TENSORS[match[2]]}"


def _permute(rows: np.ndarray, num_heads: int) -> np.ndarray:  # [H * HD, R]
    """GGUF's order of a head's rows: channels that rotate together stand next to each other."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
