"""Runs the decoder on a batch: the base for all rows at once, beside it each row's own mixture, and paged attention."""

import torch
from torch import Tensor

from manylora.kernels import KvLayout, ops, write_kv
from manylora.models.config import LlamaConfig
from manylora.models.llama import Llama
from manylora.models.lora_batch import LoraBatch
from manylora.models.sites import Stack, site_name, stack_shape
from manylora.text.batch import Batch


def decoder_stacks(config: LlamaConfig) -> list[tuple[str, ...]]:
    """The sites of a decoder by the stack they belong to: stack `layer * len(Stack) + i` is layer's i-th."""
    return [
        tuple(site_name(layer, member) for member in stack.members)
        for layer in range(config.num_layers)
        for stack in Stack
    ]


class Runner:
    """Holds the model and the pool's bytes; knows which tensors meet, not why."""

    def __init__(self, model: Llama, pages: Tensor, layout: KvLayout) -> None:
        self._model = model
        self._pages = pages
        self._layout = layout
        self._columns = {stack: stack_shape(model.config, stack).columns for stack in Stack}

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:  # [len(batch.sampled), vocab]  fp32
        """Compute the new tokens, store their KV, and return the logits of the rows that are sampled."""
        attention = _PagedAttention(batch, self._pages, self._layout, self._model.config.attention_scale)
        lora = None if batch.lora is None else _StackedLora(batch.lora, self._columns)
        logits: Tensor = self._model(batch.tokens, batch.positions, attention, lora, batch.logit_rows)
        return logits


class _PagedAttention:
    """Attention over the pool: writes the new tokens' KV, then lets every sequence see its own pages."""

    def __init__(self, batch: Batch, pages: Tensor, layout: KvLayout, scale: float) -> None:
        self._batch = batch
        self._pages = pages
        self._layout = layout
        self._scale = scale

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = self._batch
        write_kv(k, v, self._pages, self._layout, layer, batch.slot_page, batch.slot_index)
        return ops.paged_attention(q, self._pages, self._layout, layer, batch.sequences, scale=self._scale)


class _StackedLora:
    """The LoRA of a batch, as the decoder asks for it: per stack of a layer."""

    def __init__(self, lora: LoraBatch, columns: dict[Stack, tuple[tuple[int, int], ...]]) -> None:
        self._lora = lora
        self._columns = columns
        self._order = {stack: i for i, stack in enumerate(Stack)}

    def shrink_expand(self, layer: int, stack: Stack, x: Tensor, y: Tensor) -> None:
        outputs = [y[:, begin:end] for begin, end in self._columns[stack]]
        self._lora.apply(layer * len(self._order) + self._order[stack], x, outputs)
