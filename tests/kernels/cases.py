"""Batches for the kernel tests, built as an engine would: a pool of bytes, rank rows and KV scattered over its pages.

Every byte that belongs to nothing is NaN in every floating dtype, so a stray read shows in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manylora.kernels import (
    ROW_DTYPES,
    KvLayout,
    PagedSequences,
    RankRows,
    Segments,
    SiteRows,
    StackRows,
    hidden_layout,
    write_kv,
)

POISON = 0xFF
"""Bytes of this value are NaN in float64, float32, bfloat16 and float16 alike."""


@dataclass(frozen=True)
class LoraBatch:
    """One site of a batch: its shrink, its expand, and the A and B of each segment as they were stored."""

    x: Tensor  # [T, D]
    y: Tensor  # [T, O]
    pages: Tensor
    a: RankRows
    b: RankRows
    segments: Segments
    h_begin: Tensor
    h_stride: Tensor
    scaling: Tensor
    lora_a: list[Tensor]  # of each segment [rank, D]
    lora_b: list[Tensor]  # of each segment [O, rank]

    @property
    def stack(self) -> StackRows:
        """The site as the only one of its stack."""
        first = torch.zeros(len(self.scaling), dtype=torch.int32)
        return StackRows.of(self.a, [SiteRows((0, self.y.shape[1]), self.b, first, self.scaling)])

    def double(self) -> LoraBatch:
        """The same batch with float64 activations, for an answer of higher precision."""
        return replace(self, x=self.x.double(), y=self.y.double())

    def delta(self) -> Tensor:
        """What the LoRA adds to y in float64, from dense matrices, without pages or kernels. [T, O]"""
        delta = torch.zeros(self.y.shape, dtype=torch.float64)
        starts = self.segments.row_start.tolist()
        for s, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            for entry in range(starts[s], starts[s + 1]):
                row = int(self.segments.rows[entry])
                gain = self.segments.weight[entry].double() * self.scaling[s].double()
                delta[row] += gain * (b.double() @ (a.double() @ self.x[row].double()))
        return delta

    def spread(self) -> Tensor:
        """The root of the sum of squares of all products that `delta` adds up. [T, O]"""
        squares = torch.zeros(self.y.shape, dtype=torch.float64)
        starts = self.segments.row_start.tolist()
        for s, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            for entry in range(starts[s], starts[s + 1]):
                row = int(self.segments.rows[entry])
                gain = self.segments.weight[entry].double() * self.scaling[s].double()
                squares[row] += gain**2 * (b.double() ** 2 @ (a.double() ** 2 @ self.x[row].double() ** 2))
        return squares.sqrt()


def make_lora_batch(
    segments: Sequence[Sequence[int]],
    ranks: Sequence[int],
    *,
    D: int = 48,
    O: int = 40,  # noqa: E741  the letter of the shape legend
    num_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    row_dtypes: Sequence[torch.dtype] = (torch.float32,),
    weights: Sequence[float] = (1.0,),
    shuffle_pages: bool = False,
    page_bytes: int = 4096,
    seed: int = 0,
) -> LoraBatch:
    """segments: the rows of each, ranks: of each; row_dtypes and weights are repeated over segments and entries."""
    rng = torch.Generator().manual_seed(seed)
    rows = [row for segment in segments for row in segment]
    num_rows = max(rows, default=2) + 1 if num_rows is None else num_rows
    dtypes = [row_dtypes[s % len(row_dtypes)] for s in range(len(ranks))]
    of_a = [rank_rows(_randn(rng, r, D).div(D**0.5), dtype) for r, dtype in zip(ranks, dtypes, strict=True)]
    of_b = [rank_rows(_randn(rng, O, r).T, dtype) for r, dtype in zip(ranks, dtypes, strict=True)]
    pages, (a, b) = store_rank_rows(
        [[stored for _, stored in rows_of] for rows_of in (of_a, of_b)],
        page_bytes,
        rng if shuffle_pages else None,
    )
    record = Segments(
        rows=torch.tensor(rows, dtype=torch.int32),
        row_start=torch.tensor([0, *(len(s) for s in segments)], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        ),
        weight=torch.tensor([weights[i % len(weights)] for i in range(len(rows))], dtype=torch.float32),
        row_dtype=torch.tensor([ROW_DTYPES.index(dtype) for dtype in dtypes], dtype=torch.uint8),
    )
    h_begin, h_stride = hidden_layout(a, record)
    return LoraBatch(
        x=_randn(rng, num_rows, D).to(dtype),
        y=_randn(rng, num_rows, O).to(dtype),
        pages=pages,
        a=a,
        b=b,
        segments=record,
        h_begin=h_begin,
        h_stride=h_stride,
        scaling=torch.rand(len(ranks), generator=rng) + 0.5,
        lora_a=[values for values, _ in of_a],
        lora_b=[values.T for values, _ in of_b],
    )


def rank_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the values [rank, width] that a dtype can hold, what is stored for them: of that dtype, or bytes for int8)."""
    if dtype != torch.int8:
        return values.to(dtype), values.to(dtype)
    scale = values.abs().amax(1, keepdim=True) / 127 if len(values) else values.new_empty(0, 1)
    rounded = (values / scale).round().to(torch.int8)
    stored = torch.cat([scale.view(torch.uint8), rounded.view(torch.uint8)], dim=1)
    return rounded.double() * scale.double(), stored


def store_rank_rows(
    sites: Sequence[Sequence[Tensor]], page_bytes: int, shuffle: torch.Generator | None = None
) -> tuple[Tensor, list[RankRows]]:
    """Write the rank rows [rank, width] of each segment at each site into a poisoned pool, none across a page's end.

    shuffle: scatter single rows over the pages at multiples of their itemsize; else they are packed in order.
    """
    # Copied, for the stride of a single value is anything, and then its bytes cannot be viewed.
    flat = [
        row.clone(memory_format=torch.contiguous_format)
        for site in sites
        for matrix in site
        for row in matrix
    ]
    offsets = _scatter(flat, page_bytes, shuffle) if shuffle else _pack(flat, page_bytes)
    num_pages = max(offsets, default=0) // page_bytes + 2
    pages = torch.full((num_pages, page_bytes), POISON, dtype=torch.uint8)
    for row, at in zip(flat, offsets, strict=True):
        row_bytes = row.view(torch.uint8)
        pages.view(-1)[at : at + len(row_bytes)] = row_bytes
    table = torch.tensor(offsets, dtype=torch.int64)
    tables, first = [], 0
    for site in sites:
        bounds = torch.tensor([first, *(len(matrix) for matrix in site)]).cumsum(0).int()
        tables.append(RankRows(table, bounds[:-1], bounds[1:]))
        first = int(bounds[-1])
    return pages, tables


def _pack(rows: Sequence[Tensor], page_bytes: int) -> list[int]:
    offsets, at = [], 0
    for row in rows:
        num_bytes = row.nbytes
        assert num_bytes <= page_bytes
        at += -at % row.itemsize
        if at // page_bytes != (at + num_bytes - 1) // page_bytes:
            at += -at % page_bytes
        offsets.append(at)
        at += num_bytes
    return offsets


def _scatter(rows: Sequence[Tensor], page_bytes: int, rng: torch.Generator) -> list[int]:
    """One row a page, pages in random order, each at a random place of its page."""
    pages = torch.randperm(2 * len(rows), generator=rng)[: len(rows)].tolist()
    offsets = []
    for row, page in zip(rows, pages, strict=True):
        room = (page_bytes - row.nbytes) // row.itemsize
        offsets.append(page * page_bytes + row.itemsize * int(torch.randint(room + 1, (1,), generator=rng)))
    return offsets


@dataclass(frozen=True)
class AttentionBatch:
    """One layer's attention of a batch, and the keys and values of each sequence as they were written."""

    q: Tensor  # [T, H, HD]
    pages: Tensor
    layout: KvLayout
    layer: int
    sequences: PagedSequences
    keys: list[Tensor]  # of each sequence [context, KVH, HD]
    values: list[Tensor]


def make_attention_batch(
    lengths: Sequence[tuple[int, int]],
    *,
    H: int = 6,
    KVH: int = 2,
    HD: int = 16,
    page_tokens: int = 4,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    num_layers: int = 3,
    layer: int = 1,
    seed: int = 0,
) -> AttentionBatch:
    """lengths: (context length with the new tokens, new tokens) of each sequence. Their pages come in random order."""
    rng = torch.Generator().manual_seed(seed)
    layout = KvLayout(num_layers, page_tokens, KVH, HD, kv_dtype or dtype)
    needed = [-(-context // page_tokens) for context, _ in lengths]
    free = torch.randperm(sum(needed) + 3, generator=rng).tolist()
    pages = torch.full((len(free), layout.page_bytes), POISON, dtype=torch.uint8)
    block_table = torch.full((len(lengths), max(needed, default=0) + 1), -1, dtype=torch.int32)
    keys, values = [], []
    for i, (context, _) in enumerate(lengths):
        taken, free = free[: needed[i]], free[needed[i] :]
        block_table[i, : needed[i]] = torch.tensor(taken, dtype=torch.int32)
        keys.append(_randn(rng, context, KVH, HD).to(layout.dtype))
        values.append(_randn(rng, context, KVH, HD).to(layout.dtype))
        token = torch.arange(context)
        slot_page = block_table[i, token // page_tokens].long()
        write_kv(keys[i], values[i], pages, layout, layer, slot_page, token % page_tokens)
    num_new = torch.tensor([0, *(new for _, new in lengths)])
    sequences = PagedSequences(
        block_table=block_table,
        query_start=num_new.cumsum(0).int(),
        context_len=torch.tensor([context for context, _ in lengths], dtype=torch.int32),
    )
    q = _randn(rng, int(num_new.sum()), H, HD).to(dtype)
    return AttentionBatch(q, pages, layout, layer, sequences, keys, values)


def assert_close(
    got: Tensor, want: Tensor, dtype: torch.dtype, terms: int, *, spread: Tensor | None = None
) -> None:
    """The one rule: sums of `terms` products kept in fp32 or better and then rounded to dtype, next to the largest.

    spread: how large sums of such products are, of the shape of `want`; matters where few of them are compared, and
    all may happen to be near zero.
    """
    assert got.shape == want.shape
    sizes = [want.abs().flatten(), *([] if spread is None else [spread.flatten()])]
    # 4: what the sum is added to is about N(0, 1).
    largest = max([4.0, *(size.max().item() for size in sizes if size.numel())])
    kept = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    atol = 2 * (kept * terms**0.5 + torch.finfo(dtype).eps) * largest
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)


def _randn(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)
