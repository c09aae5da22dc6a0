"""How large the weights of a decoder's sites are: what a delta is measured against."""

# Shapes: O out-features, D in-features.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manylora.lora.diagnose import BaseNorm
from manylora.models.llama import Llama
from manylora.models.sites import Stack, site_name, stack_shape

NUM_VECTORS = 8
NUM_ITERATIONS = 8
"""Of subspace iteration. On SmolLM2-135M the largest singular value comes out at most 2 % too small."""


def base_norms(model: Llama) -> dict[str, BaseNorm]:
    """Return the norms of each site's weight, in the order of computation."""
    return {site: BaseNorm(float(weight.norm()), spectral_norm(weight)) for site, weight in _weights(model)}


def spectral_norm(weight: Tensor) -> float:  # [O, D]
    """Return the largest singular value of `weight`, from below, by subspace iteration from a fixed start."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(weight.shape[1], min(NUM_VECTORS, *weight.shape), generator=generator)
    v = start.to(weight)  # [D, vectors]
    for _ in range(NUM_ITERATIONS):
        v = torch.linalg.qr(weight.T @ (weight @ v)).Q
    return float(torch.linalg.matrix_norm(weight @ v, ord=2))


def _weights(model: Llama) -> Iterator[tuple[str, Tensor]]:
    for layer in range(model.config.num_layers):
        for stack in Stack:
            # One stack at a time: packed weights are copied into the ordinary layout. Half types have no QR.
            stacked = model.base_product(layer, stack).dense_weight()
            stacked = stacked if stacked.dtype == torch.float64 else stacked.float()
            for member, (begin, end) in zip(
                stack.members, stack_shape(model.config, stack).columns, strict=True
            ):
                yield site_name(layer, member), stacked[begin:end]
