"""Runs the decoder on a batch: the base for all rows at once, beside it each row's own mixture, and paged attention."""

import torch
from torch import Tensor

from manylora.kernels import KvLayout
from manylora.kernels.native.decoder import StepAttention
from manylora.models.llama import Llama
from manylora.models.paged_attention import PagedAttention
from manylora.models.stacked_lora import StackedLora
from manylora.text.batch import Batch


class Runner:
    """Holds the model and the pool's bytes; knows which tensors meet, not why."""

    def __init__(self, model: Llama, pages: Tensor, layout: KvLayout) -> None:
        self._model = model
        self._pages = pages
        self._layout = layout

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:  # [len(batch.sampled), vocab]  fp32
        """Compute the new tokens, store their KV, and return the logits of the rows that are sampled."""
        attention = PagedAttention(
            StepAttention(
                self._pages,
                self._layout,
                batch.sequences,
                batch.slot_page,
                batch.slot_index,
                self._model.config.attention_scale,
            )
        )
        lora = None if batch.lora is None else StackedLora(batch.lora, self._model.config)
        logits: Tensor = self._model(batch.tokens, batch.positions, attention, lora, batch.logit_rows)
        return logits
