"""What a decoder computes for each row of activations by itself, in torch operations, for any device and dtype."""

# Shapes: T rows, H heads, HD head dimension, D width of a row.

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See ops.rotate."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(turned)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See ops.add_rms_norm."""
    if delta is not None:
        x.add_(delta)
    return F.rms_norm(x, weight.shape, weight, eps)


def argmax(x: Tensor) -> Tensor:
    """See ops.argmax."""
    places = x.argmax(dim=-1, keepdim=True)  # takes NaN for the largest
    return torch.where(x.gather(-1, places).isfinite(), places, -1)[:, 0]


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ops.silu_mul."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up)
