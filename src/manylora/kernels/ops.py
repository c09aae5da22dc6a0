"""The kernels' front door: checks what is passed, says in words what is wrong with it, and hands it to a backend."""

# Shapes: as in segments.py and kv.py; H query heads.

from __future__ import annotations

import torch
from torch import Tensor

from manylora.errors import ConfigError, KernelUnavailable
from manylora.kernels import grouped, grouped_attention, native, reference
from manylora.kernels.backend import COMPUTE_DTYPES, Backend
from manylora.kernels.kv import KvLayout, PagedSequences
from manylora.kernels.segments import FLOAT_ROW_DTYPES, PlacedRows, RankRows, Segments, StackRows

BACKENDS = {
    "grouped": Backend(grouped.lora_shrink, grouped.lora_expand, grouped_attention.paged_attention),
    "reference": Backend(reference.lora_shrink, reference.lora_expand, reference.paged_attention),
}
"""All backends by name, the preferred first."""

if native.AVAILABLE:
    BACKENDS = {
        "native": Backend(
            native.lora_shrink,
            native.lora_expand,
            native.paged_attention,
            native.write_kv,
            native.rotate,
            native.add_rms_norm,
            native.silu_mul,
            native.argmax,
            native.place_rows,
            native.add_lora,
            dtypes=native.DTYPES,
            cpu_only=True,
        ),
        **BACKENDS,
    }


def available_backends() -> tuple[str, ...]:
    """Names of the backends that run here, the preferred first."""
    return tuple(BACKENDS)


def lora_shrink(
    x: Tensor,  # [T, D]  fp32, bf16, fp16 or fp64
    pages: Tensor,  # [num_pages, page_bytes]  uint8, the pool
    a: RankRows,  # rank rows of lora_a, [rank, D] of each segment
    segments: Segments,
    *,
    backend: str | None = None,
) -> Tensor:
    """h = x @ A^T for the rows of each segment with the A of its adapter.

    Returns:
        [sum over s of entries(s) * rank(s)] fp32 (fp64 for fp64): segment s as [entries(s), rank(s)], one after
        another; `hidden_layout` says where each begins.
    Raises:
        ConfigError: a shape, dtype, index or byte offset that does not fit the others.
        KernelUnavailable: no such backend, or none for this dtype.
    """
    chosen = _choose(backend, x)
    _check_pages(pages)
    _check_rows("x", x, segments)
    _check_per_segment("a", a.begin, segments)
    return chosen.shrink(x, pages, a, segments)


def lora_expand(
    y: Tensor,  # [T, O]  added to in place; may be a column slice of a wider tensor
    h: Tensor,  # from lora_shrink, perhaps of a stack of sites
    pages: Tensor,  # [num_pages, page_bytes]  uint8, the pool
    b: RankRows,  # rank rows of lora_b transposed, [rank, O] of each segment
    segments: Segments,
    h_begin: Tensor,  # [S]  int64, where the slice of this site begins in h, for the first entry of each segment
    h_stride: Tensor,  # [S]  int32, from one entry to the next
    scaling: Tensor,  # [S]  fp32, alpha / rank of each segment's adapter
    *,
    backend: str | None = None,
) -> None:
    """y[row] += weight[entry] * scaling[s] * (h[entry] @ B_s) for every entry (row, segment s).

    Raises:
        ConfigError: a shape, dtype, index or byte offset that does not fit the others.
        KernelUnavailable: no such backend, or none for this dtype.
    """
    chosen = _choose(backend, y)
    _check_pages(pages)
    _check_rows("y", y, segments)
    accumulated = torch.float64 if y.dtype == torch.float64 else torch.float32
    if h.dim() != 1 or h.dtype != accumulated:
        raise ConfigError(
            f"h must be [*] {accumulated} for a y of {y.dtype}, got {list(h.shape)} {h.dtype}"
        )
    _check_per_segment("b", b.begin, segments)
    for name, tensor, dtype in (
        ("h_begin", h_begin, torch.int64),
        ("h_stride", h_stride, torch.int32),
        ("scaling", scaling, torch.float32),
    ):
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ConfigError(
                f"{name} must be contiguous {dtype}, got strides {tensor.stride()} of {tensor.dtype}"
            )
        _check_per_segment(name, tensor, segments)
    chosen.expand(y, h, pages, b, segments, h_begin, h_stride, scaling)


def add_lora(
    y: Tensor,  # [T, O]  the outputs of all sites of the stack side by side, added to in place
    x: Tensor,  # [T, D]
    pages: Tensor,  # [num_pages, page_bytes]  uint8, the pool
    stack: StackRows,
    segments: Segments,
    *,
    backend: str | None = None,
) -> None:
    """y[row] += weight[entry] * scaling[s] * (x[row] @ A_s^T) @ B_s for every entry (row, segment s) and every site.

    Raises:
        ConfigError: a shape, dtype, index or byte offset that does not fit the others.
        KernelUnavailable: no such backend, or none for this dtype.
    """
    # A step makes four calls a layer, and the next step mostly the same ones: what fitted once is not asked again.
    activations = (x.shape, y.shape, x.dtype, y.dtype, y.device, backend)
    fitting = stack.kept.get("fitting")
    if (
        fitting is None
        or fitting[0] is not segments
        or fitting[1] is not pages
        or fitting[2] != activations
    ):
        chosen = _check_lora(y, x, pages, stack, segments, backend)
        fitting = stack.kept["fitting"] = segments, pages, activations, chosen
    chosen = fitting[3]
    if chosen.add_lora is not None:
        chosen.add_lora(y, x, pages, stack, segments)
        return
    h = chosen.shrink(x, pages, stack.a, segments)
    begins, stride = stack.hidden(segments)
    for site, h_begin in zip(stack.sites, begins, strict=True):
        columns = y[:, slice(*site.columns)]
        chosen.expand(columns, h, pages, site.b, segments, h_begin, stride, site.scaling)


def paged_attention(
    q: Tensor,  # [T, H, HD]  after rotary embedding
    pages: Tensor,  # [num_pages, page_bytes]  uint8, the pool; holds the KV of the new tokens too
    layout: KvLayout,
    layer: int,
    sequences: PagedSequences,
    *,
    scale: float,
    backend: str | None = None,
) -> Tensor:  # [T, H, HD]  of q's dtype
    """Attention of every new token over its own sequence up to and including itself.

    Raises:
        ConfigError: a shape, dtype, page or length that does not fit the others.
        KernelUnavailable: no such backend, or none for this dtype.
    """
    chosen = _choose(backend, q)
    layout.check_pages(pages)
    layout.check_layer(layer)
    if q.dim() != 3 or q.shape[2] != layout.head_dim or q.shape[1] % layout.num_kv_heads:
        raise ConfigError(
            f"q must be [T, H, {layout.head_dim}] with H a multiple of {layout.num_kv_heads}, got {list(q.shape)}"
        )
    if len(q) != sequences.query_bounds[-1]:
        raise ConfigError(
            f"q has {len(q)} rows, but the sequences have {sequences.query_bounds[-1]} new tokens"
        )
    return chosen.attend(q, pages, layout, layer, sequences, scale=scale)


def write_kv(
    k: Tensor,  # [T, KVH, HD]  keys after rotary embedding
    v: Tensor,  # [T, KVH, HD]
    pages: Tensor,  # [num_pages, page_bytes]  uint8, the pool
    layout: KvLayout,
    layer: int,
    slot_page: Tensor,  # [T]  int64, page of each token
    slot_index: Tensor,  # [T]  int64, its place within that page
    *,
    backend: str | None = None,
) -> None:
    """Store the keys and values of the new tokens in their pages, in the dtype of the layout.

    Raises:
        ConfigError: a shape or layer that does not fit the others.
        KernelUnavailable: no such backend, or none for this dtype.
    """
    chosen = _choose(backend, k)
    layout.check_pages(pages)
    layout.check_layer(layer)
    shape = (len(slot_page), layout.num_kv_heads, layout.head_dim)
    if k.shape != shape or v.shape != shape:
        raise ConfigError(
            f"k and v must be {list(shape)} (one slot per token), got {list(k.shape)} and {list(v.shape)}"
        )
    chosen.write_kv(k, v, pages, layout, layer, slot_page, slot_index)


def rotate(
    x: Tensor,  # [T, H, HD]  changed in place
    cos: Tensor,  # [T, HD / 2]
    sin: Tensor,  # [T, HD / 2]
    *,
    backend: str | None = None,
) -> None:
    """Rotate channel i of every head with channel i + HD / 2 by the row's i-th angle (RoFormer, Su et al. 2021)."""
    _choose(backend, x).rotate(x, cos, sin)


def add_rms_norm(
    x: Tensor,  # [T, D]  delta is added to it in place
    delta: Tensor | None,  # [T, D]
    weight: Tensor,  # [D]
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:  # [T, D]
    """x += delta; return x / sqrt(mean(x^2) + eps) * weight (RMSNorm, Zhang & Sennrich 2019)."""
    return _choose(backend, x).add_rms_norm(x, delta, weight, eps)


def argmax(
    x: Tensor,  # [T, V]  V at least 1
    *,
    backend: str | None = None,
) -> Tensor:  # [T]  int64
    """Return where each row's largest value is, the first of equal ones; -1 where that is infinite, or one is NaN."""
    return _choose(backend, x).argmax(x)


def silu_mul(
    gate_up: Tensor,  # [T, 2 D]  gate beside up
    *,
    backend: str | None = None,
) -> Tensor:  # [T, D]
    """Return silu(gate) * up, the gated unit of Llama's MLP (SwiGLU, Shazeer 2020)."""
    return _choose(backend, gate_up).silu_mul(gate_up)


def place_rows(
    source: Tensor,  # [N]  fp32, bf16 or fp16, on the host
    image: Tensor,  # [num_bytes]  uint8, on the host
    rows: PlacedRows,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> None:
    """Put values of an adapter where its rank rows lie in the image.

    Args:
        dtype: None moves them as they are. int8 rounds each row to 127ths of its largest magnitude.
    Raises:
        ConfigError: a row that does not lie within source and image; values, or a dtype, that no rank row has.
        KernelUnavailable: no such backend.
    """
    dtype = source.dtype if dtype is None else dtype
    if source.dtype not in FLOAT_ROW_DTYPES or source.device.type != "cpu" or not source.is_contiguous():
        raise ConfigError(
            f"source must be contiguous and one of {FLOAT_ROW_DTYPES} on a CPU, got {source.dtype} on {source.device}"
        )
    if dtype not in (source.dtype, torch.int8):
        raise ConfigError(
            f"rows of {source.dtype} stay as they are or become torch.int8, got dtype {dtype}"
        )
    if image.dtype != torch.uint8 or image.device.type != "cpu" or not image.is_contiguous():
        raise ConfigError(f"image must be contiguous uint8 on a CPU, got {image.dtype} on {image.device}")
    lowest, source_end = rows.bounds
    image_end = rows.image_bytes(dtype)
    if lowest < 0 or source_end > source.numel() or image_end > image.numel():
        raise ConfigError(
            f"rows from value {lowest} to {source_end} and up to byte {image_end} do not lie in a source of "
            f"{source.numel()} values and an image of {image.numel()} bytes"
        )
    chosen = next(iter(BACKENDS.values())) if backend is None else _named(backend)
    chosen.place_rows(source, image, rows, dtype)


def _choose(backend: str | None, activations: Tensor) -> Backend:
    """The backend of this name; None: the first that computes in the dtype of the activations, where they lie."""
    dtype, device = activations.dtype, activations.device
    if backend is None:
        for candidate in BACKENDS.values():
            if candidate.runs(dtype, device):
                return candidate
        raise KernelUnavailable(
            f"no kernel backend computes in {dtype} on {device}; there are {', '.join(BACKENDS)}, "
            f"which take {', '.join(map(str, COMPUTE_DTYPES))}"
        )
    chosen = _named(backend)
    if not chosen.runs(dtype, device):
        where = "a CPU" if chosen.cpu_only else "any device"
        raise KernelUnavailable(
            f"the kernel backend {backend} takes {', '.join(map(str, chosen.dtypes))} on {where}, "
            f"got {dtype} on {device}"
        )
    return chosen


def _named(backend: str) -> Backend:
    if backend not in BACKENDS:
        raise KernelUnavailable(f"no kernel backend is called {backend!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[backend]


def _check_lora(
    y: Tensor, x: Tensor, pages: Tensor, stack: StackRows, segments: Segments, backend: str | None
) -> Backend:
    """The backend for a call of `add_lora`, once its arguments are known to fit each other."""
    chosen = _choose(backend, y)
    _check_pages(pages)
    _check_rows("x", x, segments)
    _check_rows("y", y, segments)
    if (x.dtype == torch.float64) != (y.dtype == torch.float64):
        raise ConfigError(f"x and y must both be torch.float64 or neither, got {x.dtype} and {y.dtype}")
    _check_per_segment("a", stack.a.begin, segments)
    for begin, end in stack.columns:
        if not 0 <= begin < end <= y.shape[1]:
            raise ConfigError(f"a site has columns {begin}:{end} of a y with {y.shape[1]}")
    if chosen.add_lora is None:  # who does both at once looks there itself, without Python
        stack.check(segments, pages.numel(), x.shape[1])
    return chosen


def _check_pages(pages: Tensor) -> None:
    if pages.dtype != torch.uint8 or pages.dim() != 2 or not pages.is_contiguous():
        raise ConfigError(
            f"pages must be contiguous [num_pages, page_bytes] torch.uint8, got {list(pages.shape)} {pages.dtype}"
        )


def _check_rows(name: str, tensor: Tensor, segments: Segments) -> None:
    if tensor.dim() != 2 or tensor.shape[0] < segments.num_rows:
        raise ConfigError(
            f"{name} must be two-dimensional with at least the {segments.num_rows} rows that the segments name, "
            f"got {list(tensor.shape)}"
        )


def _check_per_segment(name: str, tensor: Tensor, segments: Segments) -> None:
    if tensor.shape[0] != segments.num_segments:
        raise ConfigError(
            f"{name} has {tensor.shape[0]} values, but there are {segments.num_segments} segments"
        )
