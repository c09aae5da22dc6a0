"""Causal attention over whole sequences, without a cache: the decoder's reference, for tests and tools."""

# Shapes: T rows (tokens of all sequences, one after the other), H query heads, KVH key/value heads, HD head_dim.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseAttention:
    """An `llama.Attention` for rows that are complete sequences from position 0 on."""

    def __init__(self, sequence_lens: Sequence[int], *, scale: float) -> None:
        """sequence_lens: tokens of each sequence, in the order of the rows; their sum is T."""
        self.sequence_lens = list(sequence_lens)
        self.scale = scale

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [T, H, HD]
        parts = (torch.split(rows, self.sequence_lens) for rows in (q, k, v))
        return torch.cat([self._attend(*sequence) for sequence in zip(*parts, strict=True)])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rows.transpose(0, 1) for rows in (q, k, v))
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return attended.transpose(0, 1)

    @property
    def positions(self) -> Tensor:  # [T]
        """The position of every row."""
        return torch.cat([torch.arange(length) for length in self.sequence_lens])
