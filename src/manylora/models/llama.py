"""The decoder of the Llama family, on flat rows. Knows no request, page or adapter: attention and LoRA are given.

Layer by layer in Python, which any attention and LoRA can be given to; or, where these are the pool's own and all parts
are native, all layers in one call (`_run_layers`).
"""

# Shapes: T rows (tokens of all sequences, one after the other), H query heads, KVH key/value heads, HD head_dim,
# D hidden_size, I intermediate_size, N rows whose logits are wanted.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manylora.kernels import ops
from manylora.kernels.native.decoder import KV_DTYPES, DecoderWeights, LayerWeights, run_layers
from manylora.kernels.native.int8 import Int8Weight
from manylora.kernels.native.tiles import TileWeight
from manylora.models.config import LlamaConfig
from manylora.models.layers import BaseProduct, LaidOutWeight
from manylora.models.paged_attention import PagedAttention
from manylora.models.rope import Rotation, inverse_frequencies
from manylora.models.sites import Stack, site_name, stack_shape
from manylora.models.stacked_lora import StackedLora


class Attention(Protocol):
    """What the decoder asks for in each layer: the keys and values are the caller's to keep."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [T, H, HD] for q [T, H, HD], k and v [T, KVH, HD], rotated already; not necessarily contiguous."""


class LoraHook(Protocol):
    """What the decoder asks of the layer above, once per layer and stack."""

    def shrink_expand(self, layer: int, stack: Stack, x: Tensor, y: Tensor) -> None:
        """Add the LoRA of every row in place to y [T, out of the stack], for x [T, in]; both contiguous."""


class Llama(nn.Module):
    """A decoder with stacked base products. Inference only; made by loading.load_model or tiny.tiny_model."""

    embedding: Tensor  # [vocab, D]
    final_norm: Tensor  # [D]
    frequencies: Tensor  # [HD / 2]  fp32

    def __init__(self, config: LlamaConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.register_buffer("embedding", embedding)
        self.layers = nn.ModuleList(
            _DecoderLayer(config, i, dtype, device) for i in range(config.num_layers)
        )
        self.register_buffer("final_norm", torch.empty(config.hidden_size, dtype=dtype, device=device))
        self.output = BaseProduct(
            config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=device
        )
        if config.tie_embeddings:
            self.output.weight = self.embedding
        self.register_buffer("frequencies", inverse_frequencies(config.rope, config.head_dim).to(device))
        self.layer_seconds: Tensor | None = None
        """[3] fp64. Where one call for all layers adds what its products, LoRA and attention take, for who listens."""
        self._products = [layer.product(stack) for layer in self._decoder_layers() for stack in Stack]
        self._for_native: tuple[list[LaidOutWeight | None], DecoderWeights | None] = [], None

    def __getstate__(self) -> dict[str, Any]:
        """Without the addresses of its weights, which a copy has elsewhere."""
        return self.__dict__ | {"_for_native": ([], None)}

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def is_int8(self) -> bool:
        """Whether the weights of the base products are of eight bits; all else is of `dtype`."""
        return self.output.is_rounded

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,  # [T]  int
        positions: Tensor,  # [T]  int, place of each token in its sequence
        attention: Attention,
        lora: LoraHook | None = None,
        logit_rows: Tensor | None = None,  # [N]  int, None: all rows
    ) -> Tensor:  # [N, vocab]  fp32 (fp64 for an fp64 model)
        """Return the logits of the rows asked for.

        Args:
            lora: adds the rows' adapters to each stack; None runs the base model.
        """
        x = F.embedding(tokens, self.embedding)
        rotation = Rotation.at(positions, self.frequencies, self.dtype)
        delta = self._run_layers(x, rotation, attention, lora)
        if logit_rows is not None:
            x, delta = x[logit_rows], None if delta is None else delta[logit_rows]
        x = ops.add_rms_norm(x, delta, self.final_norm, self.config.rms_norm_eps)
        logits: Tensor = self.output(x)
        return logits if self.dtype == torch.float64 else logits.float()

    def at_once(self, attention: Attention, lora: LoraHook | None) -> DecoderWeights | None:
        """What a pass with these runs all its layers of in one native call; None: it runs them one by one."""
        all_native = (
            type(attention) is PagedAttention
            and attention.step.layout.dtype in KV_DTYPES
            and (lora is None or type(lora) is StackedLora)
            and "native" in ops.available_backends()
        )
        return self.native_weights() if all_native else None

    def _run_layers(
        self, x: Tensor, rotation: Rotation, attention: Attention, lora: LoraHook | None
    ) -> Tensor | None:
        """Change x [T, D] in place; return what is still to be added to it."""
        weights = self.at_once(attention, lora)
        if weights is not None:
            assert isinstance(attention, PagedAttention)
            assert lora is None or isinstance(lora, StackedLora)
            step = None if lora is None else lora.batch.for_decoder(weights)
            # Calls one by one refuse in words what lies where it should not.
            if step is None or step.is_inside:
                turns = rotation.cos, rotation.sin
                return run_layers(weights, x, *turns, attention.step, step, self.layer_seconds)
        delta: Tensor | None = None
        for layer in self.layers:
            delta = layer(x, delta, rotation, attention, lora)
        return delta

    def parameter_slots(self) -> dict[str, Tensor]:
        """Return where each tensor of a checkpoint goes, by its name in transformers: views to copy into.

        Valid until `finish`.
        """
        slots: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.final_norm,
        }
        if not self.config.tie_embeddings:
            assert self.output.weight is not None
            slots["lm_head.weight"] = self.output.weight
        for layer in self._decoder_layers():
            slots.update(layer.parameter_slots())
        return slots

    def finish(self, *, int8: bool = False) -> None:
        """Lay the products out for speed, once all slots are filled; int8: round their weights to eight bits."""
        self.output.finish(int8=int8, keep_dense=self.config.tie_embeddings)
        for layer in self._decoder_layers():
            for stack in Stack:
                layer.product(stack).finish(int8=int8)

    def base_product(self, layer: int, stack: Stack) -> BaseProduct:
        """The dense product of a stack, for who wants its weight or implementation."""
        return self._decoder_layers()[layer].product(stack)

    def native_weights(self) -> DecoderWeights | None:
        """What one call of native code needs to run all layers; None where some part of them is not native."""
        laid_out = [product.laid_out for product in self._products]
        # Compared as objects: a product that was finished again has another weight.
        if laid_out != self._for_native[0]:
            self._for_native = laid_out, self._find_native_weights()
        return self._for_native[1]

    def _find_native_weights(self) -> DecoderWeights | None:
        layers = []
        for layer in self._decoder_layers():
            laid_out = [layer.product(stack).laid_out for stack in Stack]
            kind = type(laid_out[0])
            products = tuple(
                p for p in laid_out if isinstance(p, TileWeight | Int8Weight) and type(p) is kind
            )
            if layer.q_norm is not None or len(products) < len(laid_out):
                return None
            layers.append(LayerWeights(layer.attention_norm, layer.mlp_norm, products))
        if not layers or self.dtype != torch.float32:
            return None
        config = self.config
        columns = [stack_shape(config, stack).columns for stack in Stack]
        return DecoderWeights(
            layers, config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps, columns
        )

    def _decoder_layers(self) -> list[_DecoderLayer]:
        return cast("list[_DecoderLayer]", list(self.layers))


class _DecoderLayer(nn.Module):
    """Attention and MLP with their norms; x is the residual stream.

    What a layer adds to x last is handed on, so that the next norm adds it in the pass that it makes anyway.
    """

    attention_norm: Tensor  # [D]
    mlp_norm: Tensor  # [D]
    q_norm: Tensor | None  # [HD]
    k_norm: Tensor | None  # [HD]

    def __init__(self, config: LlamaConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.qkv = _stacked(config, Stack.QKV, config.qkv_bias, dtype, device)
        self.o = _stacked(config, Stack.O, config.o_bias, dtype, device)
        self.gate_up = _stacked(config, Stack.GATE_UP, config.mlp_bias, dtype, device)
        self.down = _stacked(config, Stack.DOWN, config.mlp_bias, dtype, device)
        self._columns = {stack: stack_shape(config, stack).columns for stack in Stack}
        for name in ("attention_norm", "mlp_norm"):
            self.register_buffer(name, torch.empty(config.hidden_size, dtype=dtype, device=device))
        for name in ("q_norm", "k_norm"):
            weight = torch.empty(config.head_dim, dtype=dtype, device=device) if config.qk_norm else None
            self.register_buffer(name, weight)

    def product(self, stack: Stack) -> BaseProduct:
        by_stack = {
            Stack.QKV: self.qkv,
            Stack.O: self.o,
            Stack.GATE_UP: self.gate_up,
            Stack.DOWN: self.down,
        }
        return by_stack[stack]

    def forward(
        self,
        x: Tensor,  # [T, D]  changed in place
        delta: Tensor | None,  # [T, D]  what the layer before hands on
        rotation: Rotation,
        attention: Attention,
        lora: LoraHook | None,
    ) -> Tensor:  # [T, D]
        """Add delta and attention to x; return what the MLP adds to it."""
        normed = ops.add_rms_norm(x, delta, self.attention_norm, self.eps)
        delta = self._attend(normed, rotation, attention, lora)
        return self._mlp(ops.add_rms_norm(x, delta, self.mlp_norm, self.eps), lora)

    def _attend(self, x: Tensor, rotation: Rotation, attention: Attention, lora: LoraHook | None) -> Tensor:
        qkv = self._product(Stack.QKV, self.qkv, x, lora)
        heads = qkv.view(len(x), self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        q, k, v = heads[:, : self.num_heads], heads[:, self.num_heads : num_rotated], heads[:, num_rotated:]
        if self.q_norm is not None and self.k_norm is not None:
            # Written back so that q and k stay side by side and are rotated at once.
            q.copy_(F.rms_norm(q, self.q_norm.shape, self.q_norm, self.eps))
            k.copy_(F.rms_norm(k, self.k_norm.shape, self.k_norm, self.eps))
        rotation.apply_(heads[:, :num_rotated])
        attended = attention(self.index, q, k, v).reshape(len(x), self.num_heads * self.head_dim)
        return self._product(Stack.O, self.o, attended, lora)

    def _mlp(self, x: Tensor, lora: LoraHook | None) -> Tensor:
        gate_up = self._product(Stack.GATE_UP, self.gate_up, x, lora)
        return self._product(Stack.DOWN, self.down, ops.silu_mul(gate_up), lora)

    def _product(self, stack: Stack, product: BaseProduct, x: Tensor, lora: LoraHook | None) -> Tensor:
        y: Tensor = product(x)
        if lora is not None:
            lora.shrink_expand(self.index, stack, x, y)
        return y

    def parameter_slots(self) -> dict[str, Tensor]:
        return dict(self._named_slots())

    def _named_slots(self) -> Iterator[tuple[str, Tensor]]:
        yield site_name(self.index, "input_layernorm.weight"), self.attention_norm
        yield site_name(self.index, "post_attention_layernorm.weight"), self.mlp_norm
        if self.q_norm is not None and self.k_norm is not None:
            yield site_name(self.index, "self_attn.q_norm.weight"), self.q_norm
            yield site_name(self.index, "self_attn.k_norm.weight"), self.k_norm
        for stack in Stack:
            product = self.product(stack)
            assert product.weight is not None
            for member, (begin, end) in zip(stack.members, self._columns[stack], strict=True):
                yield site_name(self.index, f"{member}.weight"), product.weight[begin:end]
                if product.bias is not None:
                    yield site_name(self.index, f"{member}.bias"), product.bias[begin:end]


def _stacked(
    config: LlamaConfig, stack: Stack, bias: bool, dtype: torch.dtype, device: torch.device
) -> BaseProduct:
    shape = stack_shape(config, stack)
    return BaseProduct(shape.in_features, shape.out_features, bias=bias, dtype=dtype, device=device)
