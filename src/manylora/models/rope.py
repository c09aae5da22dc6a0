"""Rotary position embedding: angles of positions, and the rotation of queries and keys by them."""

# Shapes: T rows, H heads, HD head_dim.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from manylora.errors import ModelError
from manylora.kernels import ops

RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """How the rotation's frequencies follow from the head's size."""

    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""

    kind: RopeKind = "default"
    """linear: all frequencies divided by `factor`. llama3: only the long wavelengths, with a smooth passage."""

    factor: float = 1.0
    """By how much the context was stretched; 1 for `default`."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position / low_freq_factor are stretched in full."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position / high_freq_factor stay as they are."""

    original_max_position: int = 8192
    """llama3: context length before the stretch, in tokens."""

    def __post_init__(self) -> None:
        if self.theta <= 0 or self.factor <= 0:
            raise ModelError(
                f"rope needs theta and factor above 0, got theta {self.theta}, factor {self.factor}"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ModelError(
                "rope_type llama3 needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:  # [HD / 2]
    """Return the angle per position of each pair of channels, in radians, fp32.

    fp32 whatever the model's dtype: the rounding of the frequencies is part of what the weights were
    trained with, and transformers does the same.
    Source:
        RoFormer (Su et al. 2021); linear: position interpolation (Chen et al. 2023); llama3: the scaling
        published with Llama 3.1.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _stretch_long_waves(frequencies, rope)
    return frequencies


def _stretch_long_waves(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    wavelengths = 2 * math.pi / frequencies  # in tokens
    turns = rope.original_max_position / wavelengths  # within the context before the stretch
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosine and sine of every row's angles; made once per forward pass and used by all layers."""

    cos: Tensor  # [T, HD / 2]
    sin: Tensor  # [T, HD / 2]

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the rotation of rows at `positions` [T]; angles are taken in fp32, then rounded to `dtype`."""
        angles = positions.to(torch.float32)[:, None] * frequencies
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def apply_(self, x: Tensor) -> Tensor:  # [T, H, HD] -> the same
        """Rotate x in place: channel i with channel i + HD / 2."""
        ops.rotate(x, self.cos, self.sin)
        return x
