"""The slow truth: what the kernels mean, in plain loops. Backends are tested against it; nothing is optimised here.

Reads one rank row, one key and one value at a time, straight from the bytes of the pool. Computes in float32, or in
float64 where x (or q) is float64; tests use the latter as the more precise answer.
"""

# Shapes: as in segments.py and kv.py; H query heads.

import torch
from torch import Tensor

from manylora.kernels.kv import KvLayout, PagedSequences
from manylora.kernels.segments import ROW_DTYPES, SCALE_BYTES, PlacedRows, RankRows, Segments, bytes_of_row


def lora_shrink(x: Tensor, pages: Tensor, a: RankRows, segments: Segments) -> Tensor:
    """h[entry, r] = sum over D of x[row of entry] * (rank row r of the entry's segment). See ops.lora_shrink."""
    compute = torch.promote_types(x.dtype, torch.float32)
    parts = [x.new_empty(0, dtype=compute)]
    for s in range(segments.num_segments):
        x_rows = x[_rows(segments, s)].to(compute)
        columns = [x_rows @ row for row in _rank_rows(pages, a, segments, s, x.shape[1], compute)]
        if columns:
            parts.append(torch.stack(columns, dim=1).flatten())
    return torch.cat(parts)


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
    """y[row of entry] += weight * scaling * sum over r of h[entry, r] * (rank row r). See ops.lora_expand."""
    compute = torch.promote_types(y.dtype, torch.float32)
    for s in range(segments.num_segments):
        rank_rows = _rank_rows(pages, b, segments, s, y.shape[1], compute)
        for i, row in enumerate(_rows(segments, s).tolist()):
            first = int(h_begin[s]) + i * int(h_stride[s])
            delta = torch.zeros(y.shape[1], dtype=compute, device=y.device)
            for r, rank_row in enumerate(rank_rows):
                delta += h[first + r].to(compute) * rank_row
            gain = segments.weight[int(segments.row_start[s]) + i].to(compute) * scaling[s].to(compute)
            y[row] = (y[row].to(compute) + gain * delta).to(y.dtype)


def place_rows(source: Tensor, image: Tensor, rows: PlacedRows, dtype: torch.dtype) -> None:
    """One rank row after the other. See ops.place_rows."""
    for begin, stride, length, offset in zip(
        rows.begin.tolist(), rows.stride.tolist(), rows.length.tolist(), rows.offset.tolist(), strict=True
    ):
        row = source[begin : begin + length * stride : stride][:length]
        row_bytes = row.contiguous().view(torch.uint8) if dtype == source.dtype else _rounded(row.float())
        image[offset : offset + len(row_bytes)] = row_bytes


def _rounded(row: Tensor) -> Tensor:
    """The bytes of a rank row [W] in int8: its scale, then its values."""
    largest = row.abs().max().reshape(1) if len(row) else torch.zeros(1)
    scale = largest / 127.0 if row.isfinite().all() else torch.tensor([torch.nan])
    values = (row / scale).round().clamp(-127, 127) if bool(scale > 0) else torch.zeros_like(row)
    return torch.cat([scale.view(torch.uint8), values.to(torch.int8).view(torch.uint8)])


def paged_attention(
    q: Tensor, pages: Tensor, layout: KvLayout, layer: int, sequences: PagedSequences, *, scale: float
) -> Tensor:
    """Causal attention of each new token over its sequence, one row and one head at a time. See ops.paged_attention."""
    compute = torch.promote_types(q.dtype, torch.float32)
    table = sequences.check_pages(len(pages), layout.page_tokens)
    planes = layout.planes(pages, layer)
    group = q.shape[1] // layout.num_kv_heads
    out = torch.empty_like(q)
    for i, context_len in enumerate(sequences.context_len.tolist()):
        begin, end = sequences.query_start[i : i + 2].tolist()
        slots = [divmod(t, layout.page_tokens) for t in range(context_len)]
        tokens = [planes[int(table[i, page]), :, at].to(compute) for page, at in slots]  # each [2, KVH, HD]
        for row in range(begin, end):
            visible = torch.stack(tokens[: context_len - (end - 1 - row)])
            for head in range(q.shape[1]):
                keys, values = visible[:, 0, head // group], visible[:, 1, head // group]
                scores = keys @ q[row, head].to(compute) * scale
                weights = torch.exp(scores - scores.max())
                out[row, head] = ((weights / weights.sum()) @ values).to(q.dtype)
    return out


def _rows(segments: Segments, s: int) -> Tensor:
    return segments.rows[int(segments.row_start[s]) : int(segments.row_start[s + 1])].long()


def _rank_rows(
    pages: Tensor, table: RankRows, segments: Segments, s: int, width: int, compute: torch.dtype
) -> list[Tensor]:
    """The rank rows of segment s, each [width], read from the bytes of the pool."""
    dtype = ROW_DTYPES[int(segments.row_dtype[s])]
    num_bytes = bytes_of_row(dtype, width)
    table.check_inside(pages.numel(), segments.row_bytes(width))
    offsets = table.offset[int(table.begin[s]) : int(table.end[s])].tolist()
    # clone, because a tensor may be viewed as a wider dtype only where its storage is aligned to it
    stored = [pages.view(-1)[at : at + num_bytes].clone() for at in offsets]
    if dtype != torch.int8:
        return [row.view(dtype).to(compute) for row in stored]
    return [
        row[SCALE_BYTES:].view(dtype).to(compute) * row[:SCALE_BYTES].view(torch.float32).to(compute)
        for row in stored
    ]
