"""What a backend is: one implementation of every kernel, and what its activations may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manylora.kernels import kv, reference, rowwise
from manylora.kernels.kv import KvLayout, PagedSequences
from manylora.kernels.segments import PlacedRows, RankRows, Segments, StackRows

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What x, y and q may be. Sums are kept in float32, or in float64 for float64."""


class Shrink(Protocol):
    def __call__(self, x: Tensor, pages: Tensor, a: RankRows, segments: Segments) -> Tensor: ...


class Expand(Protocol):
    def __call__(
        self,
        y: Tensor,
        h: Tensor,
        pages: Tensor,
        b: RankRows,
        segments: Segments,
        h_begin: Tensor,
        h_stride: Tensor,
        scaling: Tensor,
    ) -> None: ...


class AddLora(Protocol):
    def __call__(
        self, y: Tensor, x: Tensor, pages: Tensor, stack: StackRows, segments: Segments
    ) -> None: ...


class Attend(Protocol):
    def __call__(
        self,
        q: Tensor,
        pages: Tensor,
        layout: KvLayout,
        layer: int,
        sequences: PagedSequences,
        *,
        scale: float,
    ) -> Tensor: ...


class WriteKv(Protocol):
    def __call__(
        self,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        layout: KvLayout,
        layer: int,
        slot_page: Tensor,
        slot_index: Tensor,
    ) -> None: ...


class Rotate(Protocol):
    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> None: ...


class AddRmsNorm(Protocol):
    def __call__(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor: ...


class Argmax(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor: ...


class PlaceRows(Protocol):
    def __call__(self, source: Tensor, image: Tensor, rows: PlacedRows, dtype: torch.dtype) -> None: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of every kernel."""

    shrink: Shrink
    expand: Expand
    attend: Attend
    write_kv: WriteKv = kv.write_kv
    rotate: Rotate = rowwise.rotate
    add_rms_norm: AddRmsNorm = rowwise.add_rms_norm
    silu_mul: SiluMul = rowwise.silu_mul
    argmax: Argmax = rowwise.argmax
    place_rows: PlaceRows = reference.place_rows
    add_lora: AddLora | None = None
    """Shrink and expand at once; None: one after the other."""
    dtypes: tuple[torch.dtype, ...] = COMPUTE_DTYPES
    """What its activations may be."""
    cpu_only: bool = False

    def runs(self, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype in self.dtypes and (device.type == "cpu" or not self.cpu_only)
