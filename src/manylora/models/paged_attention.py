"""Attention over the pool, as the decoder asks for it."""

from torch import Tensor

from manylora.kernels import ops
from manylora.kernels.native.decoder import StepAttention


class PagedAttention:
    """Writes the new tokens' KV, then lets every sequence see its own pages: a `llama.Attention`."""

    def __init__(self, step: StepAttention) -> None:
        self.step = step

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step = self.step
        ops.write_kv(k, v, step.pages, step.layout, layer, step.slot_page, step.slot_index)
        return ops.paged_attention(q, step.pages, step.layout, layer, step.sequences, scale=step.scale)
