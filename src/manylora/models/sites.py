"""The sites of a decoder layer, and the stacks in which the decoder computes them.

A stack is one product for several sites that read the same input: their weights lie below each other in one
matrix, so their outputs lie side by side.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from manylora.models.config import LlamaConfig


class Stack(enum.Enum):
    """The four products of a layer. The value names the member sites, in the order of their columns."""

    QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    O = ("self_attn.o_proj",)  # noqa: E741  the field's name for it
    GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
    DOWN = ("mlp.down_proj",)

    @property
    def members(self) -> tuple[str, ...]:
        members: tuple[str, ...] = self.value
        return members


@dataclass(frozen=True, slots=True)
class StackShape:
    """Sizes of a stack in one model."""

    in_features: int
    columns: tuple[tuple[int, int], ...]
    """(begin, end) of each member's columns in the stack's output, in the order of `Stack.members`."""

    @property
    def out_features(self) -> int:
        return self.columns[-1][1]


def stack_shape(config: LlamaConfig, stack: Stack) -> StackShape:
    q_features, kv_features = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    in_features, widths = {
        Stack.QKV: (config.hidden_size, (q_features, kv_features, kv_features)),
        Stack.O: (q_features, (config.hidden_size,)),
        Stack.GATE_UP: (config.hidden_size, (config.intermediate_size, config.intermediate_size)),
        Stack.DOWN: (config.intermediate_size, (config.hidden_size,)),
    }[stack]
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return StackShape(in_features, tuple(zip([0, *ends[:-1]], ends, strict=True)))


def site_name(layer: int, member: str) -> str:
    """The module path of a site, as in transformers and in adapter files."""
    return f"model.layers.{layer}.{member}"


def base_sites(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return every site an adapter may change, with (in_features, out_features), in the order of computation."""
    shapes = {stack: stack_shape(config, stack) for stack in Stack}
    return {
        site_name(layer, member): (shape.in_features, end - begin)
        for layer in range(config.num_layers)
        for stack, shape in shapes.items()
        for member, (begin, end) in zip(stack.members, shape.columns, strict=True)
    }
