"""Listens to a decoder: how long its products, its LoRA and its attention take in each forward pass, and on what.

Hooks of torch's modules, and where all layers are one native call its own clock. A pass takes a little longer for it,
so throughput is measured without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from manylora.models.config import LlamaConfig
from manylora.models.layers import BaseProduct
from manylora.models.llama import Attention, Llama, LoraHook
from manylora.models.lora_batch import LoraBatch
from manylora.models.sites import Stack, stack_shape
from manylora.models.stacked_lora import StackedLora


@dataclass(kw_only=True)
class Pass:
    """One forward pass: what it had to do, and the seconds of each kind of work."""

    num_rows: int
    num_logits: int

    attended: int
    """Pairs of a new token and a token that it sees."""

    kv_tokens: int
    """Tokens whose keys and values were read."""

    lora_bytes: int = 0
    """Of the rank rows of its adapters, each once."""

    lora_flops: int = 0
    base_s: float = 0.0
    lora_s: float = 0.0
    attention_s: float = 0.0
    """The writing of the new tokens' KV included."""

    forward_s: float = 0.0

    step_s: float = 0.0
    """Of the engine's whole step; whoever calls it sets it."""

    @property
    def is_decode(self) -> bool:
        """Whether every row is the last of its sequence, so that none fills KV alone."""
        return self.num_rows == self.num_logits

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PassClock:
    """Notes every pass of a decoder while it is entered, in `passes`."""

    def __init__(self, model: Llama) -> None:
        self.passes: list[Pass] = []
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._began_s = self._product_began_s = 0.0
        self._layer_seconds = torch.zeros(3, dtype=torch.float64)
        self._work: tuple[LoraBatch, tuple[int, int]] | None = None

    def __enter__(self) -> Self:
        self._model.layer_seconds = self._layer_seconds
        products = [module for module in self._model.modules() if isinstance(module, BaseProduct)]
        self._handles = [
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end),
            *(product.register_forward_pre_hook(self._begin_product) for product in products),
            *(product.register_forward_hook(self._end_product) for product in products),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.layer_seconds = None
        for handle in self._handles:
            handle.remove()

    def _begin(self, _: object, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, positions, attention, lora, logit_rows = arguments
        attended, kv_tokens = _seen(positions)
        self.passes.append(
            Pass(
                num_rows=len(tokens),
                num_logits=len(tokens) if logit_rows is None else len(logit_rows),
                attended=attended,
                kv_tokens=kv_tokens,
            )
        )
        if isinstance(lora, StackedLora):
            self.passes[-1].lora_bytes, self.passes[-1].lora_flops = self._lora_work(lora.batch)
        self._layer_seconds.zero_()
        if self._model.at_once(attention, lora) is None:
            attention = _timed(attention, self.passes[-1])
            lora = None if lora is None else _TimedLora(lora, self.passes[-1])
        self._began_s = time.perf_counter()
        return tokens, positions, attention, lora, logit_rows

    def _end(self, *_: object) -> None:
        now = self.passes[-1]
        now.forward_s = time.perf_counter() - self._began_s
        # Zeros, if layers were called one by one.
        products_s, lora_s, attention_s = self._layer_seconds.tolist()
        now.base_s += products_s
        now.lora_s += lora_s
        now.attention_s += attention_s

    def _begin_product(self, *_: object) -> None:
        self._product_began_s = time.perf_counter()

    def _end_product(self, *_: object) -> None:
        self.passes[-1].base_s += time.perf_counter() - self._product_began_s

    def _lora_work(self, batch: LoraBatch) -> tuple[int, int]:
        # While requests decode, one batch serves step after step.
        if self._work is None or self._work[0] is not batch:
            self._work = batch, lora_work(batch, self._model.config)
        return self._work[1]


class _TimedLora:
    """The hook for LoRA, with a clock."""

    def __init__(self, lora: LoraHook, now: Pass) -> None:
        self._lora = lora
        self._pass = now

    def shrink_expand(self, layer: int, stack: Stack, x: Tensor, y: Tensor) -> None:
        began_s = time.perf_counter()
        self._lora.shrink_expand(layer, stack, x, y)
        self._pass.lora_s += time.perf_counter() - began_s


def _timed(attention: Attention, now: Pass) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        began_s = time.perf_counter()
        out = attention(layer, q, k, v)
        now.attention_s += time.perf_counter() - began_s
        return out

    return attend


def _seen(positions: Tensor) -> tuple[int, int]:
    """(attended, kv_tokens) of rows at these positions, sequence after sequence."""
    seen = positions.numpy(force=True) + 1
    # Where the next row does not go on, a sequence ends. Two that happen to follow on count as one: it reads less, and
    # a floor may be too low, never too high.
    ends = np.append(np.diff(seen) != 1, True)
    return int(seen.sum()), int(seen[ends].sum())


def lora_work(batch: LoraBatch, model: LlamaConfig) -> tuple[int, int]:
    """(bytes of the rank rows of a batch, each adapter's once; multiplications and additions) of one pass."""
    tables, segments = batch.adapters, batch.segments
    shapes = [stack_shape(model, stack) for stack in Stack]
    values, num_bytes = np.zeros((2, segments.num_segments), dtype=np.int64)  # of A and B of each segment
    for stack, rank in enumerate(tables.stack_rank.T):
        width = shapes[stack % len(shapes)].in_features
        values += rank * width
        num_bytes += rank * segments.row_bytes(width)
    widths = [end - begin for shape in shapes for begin, end in shape.columns] * model.num_layers
    for width, rank in zip(widths, tables.site_rank.T, strict=True):
        values += rank * width
        num_bytes += rank * segments.row_bytes(width)
    return int(num_bytes.sum()), int(2 * values @ segments.num_entries)
