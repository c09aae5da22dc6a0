"""The kernels in C++, for CPUs: rank rows, keys and values are read where they lie, nothing is gathered.

One binary holds every kernel for AVX-512 (alone, with VNNI, with AMX too), for AVX2 with FMA and for any processor; the
widest set that this one has is used. Computes in float32. Activations in bfloat16 or float16 are widened for the call
and rounded after it.
"""

# Shapes: as in segments.py and kv.py; H query heads.

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.kernels import rowwise
from manylora.kernels.kv import KvLayout, PagedSequences
from manylora.kernels.kv import write_kv as write_kv_in_torch
from manylora.kernels.segments import ROW_DTYPES, PlacedRows, RankRows, Segments, StackRows

try:
    from manylora.kernels.native import _core
except ImportError as error:  # installed where there was no C++ compiler
    warnings.warn(
        f"manylora's native kernels are not built ({error}); the kernels in torch do the same several times slower. "
        "Install a C++ compiler and then manylora again",
        RuntimeWarning,
        stacklevel=2,
    )
    AVAILABLE = False
else:
    AVAILABLE = True

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What activations may be."""

_DTYPE_CODE = {dtype: code for code, dtype in enumerate(ROW_DTYPES)}


def isa() -> str:
    """The instruction set that the kernels use here, as the binary names it."""
    return _core.isa()


def lora_shrink(x: Tensor, pages: Tensor, a: RankRows, segments: Segments) -> Tensor:
    """See ops.lora_shrink."""
    x = _float_rows(x)
    h = torch.empty(_num_hidden(pages, a, segments, x.shape[1]))
    _core.shrink(
        x.data_ptr(), x.stride(0), x.shape[1], *_rank_rows(pages, a), *_segments(segments), h.data_ptr(), _threads()
    )  # fmt: skip
    return h


def lora_expand(
    y: Tensor,
    h: Tensor,
    pages: Tensor,
    b: RankRows,
    segments: Segments,
    h_begin: Tensor,
    h_stride: Tensor,
    scaling: Tensor,
) -> None:
    """See ops.lora_expand."""
    _num_hidden(pages, b, segments, y.shape[1])
    wide = _float_rows(y)
    _core.expand(
        wide.data_ptr(), wide.stride(0), y.shape[1], *_rank_rows(pages, b), *_segments(segments),
        h_begin.data_ptr(), h_stride.data_ptr(), h.data_ptr(), scaling.data_ptr(), _threads(),
    )  # fmt: skip
    if wide is not y:
        y.copy_(wide)


def add_lora(y: Tensor, x: Tensor, pages: Tensor, stack: StackRows, segments: Segments) -> None:
    """See ops.add_lora."""
    x, wide = _float_rows(x), _float_rows(y)
    bound_lora(wide, x, pages, stack, segments)()
    if wide is not y:
        y.copy_(wide)


def bound_lora(
    y: Tensor, x: Tensor, pages: Tensor, stack: StackRows, segments: Segments
) -> Callable[[], None]:
    """`add_lora` with its addresses looked up, so that a call is the kernel alone. The caller keeps the tensors.

    Args:
        y, x: float32, rows of neighbouring elements.
    """
    return partial(
        _core.lora, x.data_ptr(), x.stride(0), x.shape[1], y.data_ptr(), y.stride(0), pages.data_ptr(),
        *_stack(pages, stack, segments, x.shape[1]), _threads(),
    )  # fmt: skip


def paged_attention(
    q: Tensor, pages: Tensor, layout: KvLayout, layer: int, sequences: PagedSequences, *, scale: float
) -> Tensor:
    """See ops.paged_attention."""
    key = ("native", len(pages), layout.page_tokens)
    if key not in sequences.kept:
        sequences.kept[key] = sequences.check_pages(len(pages), layout.page_tokens)
    flat = _float_rows(q.flatten(1))
    out = torch.empty(flat.shape)
    table = sequences.block_table
    _core.attend(
        flat.data_ptr(), flat.stride(0), out.data_ptr(), out.stride(0), q.shape[1], *_plane(pages, layout, layer),
        len(table), table.data_ptr(), table.stride(0), sequences.query_start.data_ptr(),
        sequences.context_len.data_ptr(), scale, _threads(),
    )  # fmt: skip
    return out.view(q.shape).to(q.dtype)


def write_kv(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    layout: KvLayout,
    layer: int,
    slot_page: Tensor,
    slot_index: Tensor,
) -> None:
    """See ops.write_kv."""
    if k.dtype != torch.float32 or layout.dtype not in (torch.float32, torch.bfloat16):
        write_kv_in_torch(k, v, pages, layout, layer, slot_page, slot_index)
        return
    k, v = _float_rows(k.flatten(1)), _float_rows(v.flatten(1))
    _core.write_kv(
        k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), len(k), *_plane(pages, layout, layer),
        slot_page.data_ptr(), slot_index.data_ptr(), _threads(),
    )  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See ops.rotate."""
    T, H, HD = x.shape
    if x.dtype != torch.float32 or x.stride()[1:] != (HD, 1):
        rowwise.rotate(x, cos, sin)
        return
    cos, sin = cos.contiguous(), sin.contiguous()
    _core.rotate(x.data_ptr(), x.stride(0), T, H, HD, cos.data_ptr(), sin.data_ptr(), _threads())


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See ops.add_rms_norm."""
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        return rowwise.add_rms_norm(x, delta, weight, eps)
    T, D = x.shape
    y = torch.empty(T, D)
    added = (0, 0) if delta is None else (delta.data_ptr(), delta.stride(0))
    _core.add_rms_norm(
        x.data_ptr(), x.stride(0), *added, y.data_ptr(), D, T, D, weight.data_ptr(), eps, _threads()
    )  # fmt: skip
    return y


def argmax(x: Tensor) -> Tensor:
    """See ops.argmax."""
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        return rowwise.argmax(x)
    places = torch.empty(len(x), dtype=torch.int64)
    _core.argmax(x.data_ptr(), x.stride(0), len(x), x.shape[1], places.data_ptr(), _threads())
    return places


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ops.silu_mul."""
    if gate_up.dtype != torch.float32 or gate_up.stride(-1) != 1:
        return rowwise.silu_mul(gate_up)
    T, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(T, width)
    _core.silu_mul(gate_up.data_ptr(), gate_up.stride(0), y.data_ptr(), width, T, width, _threads())
    return y


def place_rows(source: Tensor, image: Tensor, rows: PlacedRows, dtype: torch.dtype) -> None:
    """See ops.place_rows."""
    work = _core.place_rows if dtype == source.dtype else _core.round_rows
    work(
        source.data_ptr(), _DTYPE_CODE[source.dtype], image.data_ptr(), len(rows.begin), rows.begin.data_ptr(),
        rows.stride.data_ptr(), rows.length.data_ptr(), rows.offset.data_ptr(),
    )  # fmt: skip


def _threads() -> int:
    return torch.get_num_threads()


def _float_rows(x: Tensor) -> Tensor:
    """x itself where it is float32 with rows of neighbouring elements, else a copy that is."""
    x = x if x.dtype is torch.float32 else x.to(torch.float32)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _num_hidden(pages: Tensor, table: RankRows, segments: Segments, width: int) -> int:
    """Values of h that these rank rows make or take, once they are known to lie within the pool."""
    key = ("native", segments, width, pages.numel())
    if key not in table.kept:
        table.check_inside(pages.numel(), segments.row_bytes(width))
        # Alone, or callers with fresh segments would pile entries up.
        table.kept.clear()
        table.kept[key] = int(segments.num_entries @ table.rank)
    num_hidden: int = table.kept[key]
    return num_hidden


def _rank_rows(pages: Tensor, table: RankRows) -> tuple[int, int, int, int]:
    return pages.data_ptr(), table.offset.data_ptr(), table.begin.data_ptr(), table.end.data_ptr()


def _segments(segments: Segments) -> tuple[int, int, int, int, int]:
    return (
        segments.num_segments,
        segments.rows.data_ptr(),
        segments.row_start.data_ptr(),
        segments.weight.data_ptr(),
        segments.row_dtype.data_ptr(),
    )


def _stack(pages: Tensor, stack: StackRows, segments: Segments, width: int) -> tuple[int, ...]:
    """What a call needs of the records; found once, for a step makes four calls a layer with the same ones."""
    kept = stack.kept.get("native")
    if kept is None or kept[0] is not segments or kept[1] != (pages.numel(), width):
        _ = segments.entry_start  # checks where the segments begin
        sites = _sites(stack)
        places = (*_rank_rows(pages, stack.a)[1:], sites.ctypes.data, len(sites), *_segments(segments))
        # New adapters in a step make this new for every stack, so there is no time for checks in Python.
        if not _core.is_inside(width, *places, stack.a.offset.shape[0], pages.numel()):
            stack.check(segments, pages.numel(), width)
        arguments = (*places, segments.each_row_once)
        kept = stack.kept["native"] = segments, (pages.numel(), width), arguments, sites
    arguments = kept[2]
    return arguments


def _sites(stack: StackRows) -> NDArray[np.int64]:
    """`Site` of types.hpp, of each site."""
    num_bytes = 4 * stack.a.begin.shape[0]  # of a row of each table
    tables = (stack.b_begin, stack.b_end, stack.h_column, stack.scaling)
    firsts = [table.data_ptr() for table in tables]
    sites = [
        (begin, end - begin, *(first + i * num_bytes for first in firsts))
        for i, (begin, end) in enumerate(stack.columns)
    ]
    return np.array(sites, dtype=np.int64)


def _plane(pages: Tensor, layout: KvLayout, layer: int) -> tuple[int, int, int, int, int, int, int]:
    half_plane = layout.page_tokens * layout.token_dim * layout.dtype.itemsize
    keys = pages.data_ptr() + 2 * layer * half_plane
    code = _DTYPE_CODE[layout.dtype]
    return (
        keys, keys + half_plane, layout.page_bytes, layout.page_tokens, layout.num_kv_heads, layout.head_dim, code
    )  # fmt: skip
