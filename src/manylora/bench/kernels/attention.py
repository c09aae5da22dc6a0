"""Paged attention and the writing of KV, on pages in random order; every call is on another layer's plane."""

# Shapes: N sequences of C tokens, n of them new; T = N * n rows, H query heads, KVH key heads, HD head dimension.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manylora.bench.kernels.case import Arm, Case, Work, filled, num_sets
from manylora.bench.kernels.config import KernelsConfig, numbers_of
from manylora.bench.kernels.pages import kv_layout, scattered
from manylora.kernels import KvLayout, PagedSequences, available_backends, paged_attention, write_kv
from manylora.models.config import LlamaConfig


class KvData:
    """A pool that holds nothing but the KV of some sequences."""

    def __init__(
        self,
        model: LlamaConfig,
        kv_dtype: torch.dtype,
        N: int,
        C: int,
        n: int,
        working_set_bytes: int,
        seed: int,
    ) -> None:
        one = kv_layout(model, kv_dtype)
        pages_each = -(-C // one.page_tokens)
        layer_bytes = N * pages_each * one.page_tokens * 2 * one.token_dim * kv_dtype.itemsize
        self.layout: KvLayout = kv_layout(model, kv_dtype, num_sets(working_set_bytes, layer_bytes))
        self.scale = model.attention_scale
        self.pages = _random_pages(N * pages_each, self.layout, seed)
        table = scattered(N * pages_each, seed).int().view(N, pages_each)
        self.sequences = PagedSequences(
            block_table=table,
            query_start=torch.arange(0, N * n + 1, n, dtype=torch.int32),
            context_len=torch.full((N,), C, dtype=torch.int32),
        )
        token = torch.arange(C - n, C).repeat(N)
        self.slot_page = table[
            torch.arange(N).repeat_interleave(n), token // self.layout.page_tokens
        ].long()
        self.slot_index = token % self.layout.page_tokens
        generator = torch.Generator().manual_seed(seed)
        self.q = torch.randn(N * n, model.num_heads, model.head_dim, generator=generator)
        self.k, self.v = torch.randn(2, N * n, model.num_kv_heads, model.head_dim, generator=generator)

    def attend(self, layer: int, backend: str) -> Tensor:
        return paged_attention(
            self.q, self.pages, self.layout, layer, self.sequences, scale=self.scale, backend=backend
        )

    def write(self, layer: int, backend: str) -> None:
        write_kv(
            self.k, self.v, self.pages, self.layout, layer, self.slot_page, self.slot_index, backend=backend
        )

    def written(self, backend: str) -> Tensor:
        """What a write leaves in the slots of layer 0, which hold nothing before."""
        slots = self.slot_page * self.layout.page_stride + self.slot_index
        planes = self.layout.slots(self.pages, 0)
        for plane in planes:
            plane.index_fill_(0, slots, 0)
        self.write(0, backend)
        return torch.stack([plane.index_select(0, slots) for plane in planes])


def attention_cases(config: KernelsConfig, model: LlamaConfig, working_set_bytes: int) -> Iterator[Case]:
    """Attention of every batch in `config.decode` and `config.prefill`, then the writing of every number of rows."""
    ours, kv_dtype = available_backends()[0], getattr(torch, config.kv_dtype)
    batches = [("decode", text, False) for text in config.decode] + [
        ("prefill", text, True) for text in config.prefill
    ]
    for kernel, text, all_new in batches:
        if kernel not in config.kernels:
            continue
        N, C = numbers_of(kernel, "sequences:tokens", text)
        data = KvData(model, kv_dtype, N, C, C if all_new else 1, working_set_bytes, config.seed)
        yield Case(kernel, text, _attention_work(data, N, C, all_new), _attention_arms(data, ours))
        del data
    for rows in config.rows if "kv_write" in config.kernels else ():
        data = KvData(model, kv_dtype, rows, 1, 1, working_set_bytes, config.seed)
        # k and v are in cache, as in a step; so what is written is all that memory sees.
        work = Work(2 * rows * data.layout.token_dim * kv_dtype.itemsize, 0)
        yield Case("kv_write", str(rows), work, _write_arms(data, ours))
        del data


def _attention_work(data: KvData, N: int, C: int, all_new: bool) -> Work:
    """Keys and values once; a score and a weighted value of every query and visible token."""
    H, HD = data.q.shape[1:]
    visible = C * (C + 1) // 2 if all_new else C
    kv_bytes = 2 * N * C * data.layout.token_dim * data.layout.dtype.itemsize
    # The query heads that share a key head are the rows of a product with its keys.
    rows = (C if all_new else 1) * H // data.layout.num_kv_heads
    return Work(kv_bytes, 4 * N * H * HD * visible, rows)


def _attention_arms(data: KvData, ours: str) -> dict[str, Arm]:
    def arm(backend: str) -> Arm:
        return Arm(
            lambda i: data.attend(i, backend), data.layout.num_layers, lambda: data.attend(0, backend)
        )

    return {"ours": arm(ours), "torch": arm("grouped")}


def _write_arms(data: KvData, ours: str) -> dict[str, Arm]:
    def arm(backend: str) -> Arm:
        return Arm(lambda i: data.write(i, backend), data.layout.num_layers, lambda: data.written(backend))

    return {"ours": arm(ours), "torch": arm("grouped")}


def _random_pages(num_pages: int, layout: KvLayout, seed: int) -> Tensor:
    pages = filled(num_pages * layout.page_bytes, seed).view(num_pages, layout.page_bytes)
    if layout.dtype != torch.float32:
        # The halves of a random float are not all finite as shorter floats.
        values = pages.view(layout.dtype)
        values.copy_(
            torch.randn(values.shape[1], generator=torch.Generator().manual_seed(seed)).to(layout.dtype)
        )
    return pages
