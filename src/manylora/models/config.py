"""What defines a decoder of the Llama family. Knows no file format (hf_config.py and gguf.py read those)."""

from __future__ import annotations

from dataclasses import dataclass, field

from manylora.errors import ModelError
from manylora.models.rope import RopeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """One decoder: sizes, and the few things in which the family's members differ."""

    model_type: str = "llama"
    """The family member, as transformers calls it: llama, mistral, qwen2 or qwen3."""

    name: str = ""
    """For messages and reports only."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Each key/value head serves num_heads / num_kv_heads query heads."""

    head_dim: int
    """Not always hidden_size / num_heads (Qwen3)."""

    rms_norm_eps: float
    max_position: int
    """Longest sequence in tokens, prompt and answer together."""

    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    """The output layer's weight is the embedding's."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before the rotation (Qwen3)."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_position"
        for name in sizes.split():
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelError(
                    f"{self.label}: {name} must be a whole number of at least 1, got {value!r}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.label}: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(
                f"{self.label}: head_dim must be even (channels turn in pairs), got {self.head_dim}"
            )
        if not self.rms_norm_eps > 0:
            raise ModelError(f"{self.label}: rms_norm_eps must be above 0, got {self.rms_norm_eps!r}")

    @property
    def label(self) -> str:
        """How messages call the model."""
        return f"model '{self.name}'" if self.name else "the model"

    @property
    def attention_scale(self) -> float:
        """What q k^T is multiplied by before the softmax."""
        return float(self.head_dim**-0.5)
