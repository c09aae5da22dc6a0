"""All layers of a Llama in one call of native code, for a step that has nothing else to do between its kernels."""

# Shapes: T rows, L layers, K = 4 L stacks, M sites; H query heads, KVH key/value heads, HD head_dim, D hidden_size.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.errors import ConfigError
from manylora.kernels import native
from manylora.kernels.kv import KvLayout, PagedSequences
from manylora.kernels.native.int8 import Int8Weight
from manylora.kernels.native.tiles import TileWeight
from manylora.kernels.segments import Segments, StepRows, check_index

KV_DTYPES = (torch.float32, torch.bfloat16)
"""Of keys and values that native code writes."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer: norms [D] fp32, and its products, all laid out in tiles or all in eight-bit integers."""

    attention_norm: Tensor
    mlp_norm: Tensor
    products: tuple[TileWeight | Int8Weight, ...]  # of each stack: q k v, o, gate up, down


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """What a decoder is, but for its embedding and output."""

    layers: Sequence[LayerWeights]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    columns: Sequence[Sequence[tuple[int, int]]]  # of each stack of a layer, those of its sites

    @cached_property
    def in_tiles(self) -> bool:
        return isinstance(self.layers[0].products[0], TileWeight)

    @cached_property
    def inputs(self) -> NDArray[np.int64]:
        """Width of the input of each stack. [K]"""
        return np.array([p.shape[1] for layer in self.layers for p in layer.products], dtype=np.int64)

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """`DecoderLayer` of decoder.hpp, of each layer. [L, 18]"""
        return np.array(
            [
                [
                    layer.attention_norm.data_ptr(),
                    layer.mlp_norm.data_ptr(),
                    *(field for product in layer.products for field in _fields(product)),
                ]
                for layer in self.layers
            ],
            dtype=np.int64,
        )

    @cached_property
    def site_columns(self) -> NDArray[np.int64]:
        """First column, and width, of each site. [M, 2]"""
        of_layer = [(begin, end - begin) for stack in self.columns for begin, end in stack]
        return np.array(of_layer * len(self.layers), dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True, eq=False)
class StepAttention:
    """Where the rows of a step stand in their sequences, and where their keys and values go."""

    pages: Tensor  # [num_pages, page_bytes]  uint8, the pool
    layout: KvLayout
    sequences: PagedSequences
    slot_page: Tensor  # [T]  int64, page of each new token
    slot_index: Tensor  # [T]  int64, its place within that page
    scale: float


class StepLora:
    """The adapters of a step, as native code reads them. Serves every step of the same adapters and segments."""

    def __init__(self, weights: DecoderWeights, pages: Tensor, rows: StepRows, segments: Segments) -> None:
        """
        Raises:
            ConfigError: tables that do not fit the model or each other. Whether rank rows lie in the pool: `is_inside`.
        """
        S, K, M = segments.num_segments, len(weights.inputs), len(weights.site_columns)
        first, sizes = np.asarray(rows.first_site), [len(columns) for columns in weights.columns]
        if rows.a_begin.shape != (K, S) or np.diff(first).tolist() != sizes * len(weights.layers):
            raise ConfigError(
                f"the rank rows of a step must be of {K} stacks, {M} sites and {S} segments, got those of "
                f"{len(first) - 1} stacks, {first[-1]} sites and {rows.a_begin.shape[1]} segments"
            )
        _ = segments.entry_start  # checks where the segments begin
        self._kept = weights, pages, rows, segments
        tables = (rows.b_begin, rows.b_end, rows.h_column, rows.scaling)
        row_bytes = 4 * S
        self._sites = np.empty((M, 6), dtype=np.int64)  # `Site` of types.hpp
        self._sites[:, :2] = weights.site_columns
        for column, table in enumerate(tables, start=2):
            self._sites[:, column] = table.data_ptr() + row_bytes * np.arange(M)
        self._stacks = np.empty((K, 4), dtype=np.int64)  # `StackOfStep` of decoder.hpp
        for column, table in enumerate((rows.a_begin, rows.a_end)):
            self._stacks[:, column] = table.data_ptr() + row_bytes * np.arange(K)
        self._stacks[:, 2] = self._sites.ctypes.data + self._sites.strides[0] * first[:-1]
        is_touched = (rows.a_begin != rows.a_end).any(dim=1).numpy()
        self._stacks[:, 3] = np.where(is_touched, np.diff(first), 0)
        self._segments = native._segments(segments)

    @cached_property
    def is_inside(self) -> bool:
        """Whether every rank row lies in its table and in the pool, and every site among the rank rows of its stack."""
        weights, pages, rows, _ = self._kept
        return native._core.are_stacks_inside(
            rows.offset.data_ptr(), self._stacks.ctypes.data, *self._segments, len(self._stacks),
            weights.inputs.ctypes.data, rows.offset.shape[0], pages.numel(),
        )  # fmt: skip

    @property
    def arguments(self) -> tuple[int, ...]:
        _, pages, rows, segments = self._kept
        return (
            pages.data_ptr(), rows.offset.data_ptr(), self._stacks.ctypes.data, *self._segments, segments.each_row_once,
        )  # fmt: skip

    @property
    def num_rows(self) -> int:
        """How many rows a step must have at least."""
        return self._kept[3].num_rows


NO_LORA = (0,) * 8 + (True,)
"""`StepLora.arguments` of a step without adapters."""


def run_layers(
    weights: DecoderWeights,
    x: Tensor,  # [T, D]  fp32, contiguous; the residual stream, changed in place
    cos: Tensor,  # [T, HD / 2]  fp32
    sin: Tensor,  # [T, HD / 2]  fp32
    attention: StepAttention,
    lora: StepLora | None,
    seconds: Tensor | None = None,  # [3]  fp64; what products, LoRA and attention take is added to it
) -> Tensor:  # [T, D]
    """Run all layers; return what the last one's MLP is still to add to x. The new tokens' KV is in the pool then.

    Raises:
        ConfigError: a shape, page or length that does not fit the others.
    """
    T, D = x.shape
    layout, sequences, pages = attention.layout, attention.sequences, attention.pages
    half = weights.head_dim // 2
    for name, tensor, width in (("x", x, weights.inputs[0]), ("cos", cos, half), ("sin", sin, half)):
        if tensor.shape != (T, width) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ConfigError(
                f"{name} must be [{T}, {width}] torch.float32, contiguous, got {list(tensor.shape)} {tensor.dtype}"
            )
    if layout.dtype not in KV_DTYPES:
        raise ConfigError(f"keys and values must be one of {KV_DTYPES}, got {layout.dtype}")
    layout.check_pages(pages)
    layout.check_layer(len(weights.layers) - 1)
    if (layout.num_kv_heads, layout.head_dim) != (weights.num_kv_heads, weights.head_dim):
        raise ConfigError(f"{layout} is not of {weights.num_kv_heads} heads of {weights.head_dim}")
    check_index("slot_page", attention.slot_page, torch.int64, T)
    check_index("slot_index", attention.slot_index, torch.int64, T)
    if sequences.query_bounds[-1] != T:
        raise ConfigError(f"x has {T} rows, but the sequences have {sequences.query_bounds[-1]} new tokens")
    if lora is not None and lora.num_rows > T:
        raise ConfigError(f"x has {T} rows, but the segments name {lora.num_rows}")
    key = ("native", len(pages), layout.page_tokens)
    if key not in sequences.kept:
        sequences.kept[key] = sequences.check_pages(len(pages), layout.page_tokens)
    delta, block_table = torch.empty(T, D), sequences.block_table
    keys, values, page_bytes, page_tokens, *_, kv_dtype = native._plane(pages, layout, 0)
    native._core.run_layers(
        weights.table.ctypes.data, len(weights.layers), D, int(weights.inputs[3]), weights.num_heads,
        weights.num_kv_heads, weights.head_dim, weights.eps, weights.in_tiles, x.data_ptr(), delta.data_ptr(), T,
        cos.data_ptr(), sin.data_ptr(), keys, values, page_bytes, page_tokens, kv_dtype,
        len(block_table), block_table.data_ptr(), block_table.stride(0), sequences.query_start.data_ptr(),
        sequences.context_len.data_ptr(), attention.slot_page.data_ptr(), attention.slot_index.data_ptr(),
        attention.scale, *(NO_LORA if lora is None else lora.arguments),
        0 if seconds is None else seconds.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return delta


def _fields(weight: TileWeight | Int8Weight) -> tuple[int, ...]:
    """`Weight` of decoder.hpp."""
    parts = weight.parts if isinstance(weight, TileWeight) else 0
    return _address(weight.packed), _address(weight.scale), _address(weight.bias), parts


def _address(tensor: Tensor | None) -> Any:
    return 0 if tensor is None else tensor.data_ptr()
