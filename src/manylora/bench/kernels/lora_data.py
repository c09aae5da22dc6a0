"""Real adapters in scattered pages, all layers of them, for the kernels that are measured on them.

Group after group of adapters, until all layers of all groups together are a working set; the same matrices also as
the baselines read them.
"""

# Shapes: T rows, S adapters of one rank r, each with T / S rows on average; D in-features, O out-features of a site.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from manylora.bench.floor import adapter_bytes
from manylora.bench.kernels.case import num_sets
from manylora.bench.kernels.pages import kv_layout, scattered
from manylora.kernels import Segments, SiteRows, StackRows, lora_shrink, page_memory
from manylora.lora.adapter import Adapter
from manylora.lora.synthetic import random_adapter
from manylora.models.adapter_pages import AdapterPages, ResidentAdapter
from manylora.models.config import LlamaConfig
from manylora.models.lora_batch import AdapterSet
from manylora.models.sites import Stack, base_sites, site_name, stack_shape
from manylora.models.stacked_lora import decoder_stacks

STRENGTH = 0.1


@dataclass(frozen=True)
class Site:
    """What an expand takes beside y and h."""

    rows: SiteRows
    hidden: slice  # of the stack's h, of one entry
    h_begin: Tensor
    h_stride: Tensor
    stacked_a: Tensor  # [S, r, D]  bf16, what gather reads
    stacked_b: Tensor  # [S, O, r]


@dataclass(frozen=True)
class StackSet:
    """One stack of one layer, for one group of adapters."""

    rows: StackRows
    sites: list[Site]


@dataclass(frozen=True)
class Dense:
    """The same stack as float32 matrices, one of each adapter."""

    a: list[Tensor]  # each [D, ranks of all sites]
    b: list[list[Tensor]]  # of each site, each [r, O]


class LoraData:
    """Adapters, activations, and the tables that find one in the other."""

    def __init__(
        self, model: LlamaConfig, shape: tuple[int, int, int], working_set_bytes: int, seed: int
    ) -> None:
        self.model, self.shape, self.seed = model, shape, seed
        T, S, r = shape
        generator = torch.Generator().manual_seed(seed)
        starts = np.linspace(0, T, S + 1).astype(np.int32)
        self.segments = Segments(
            rows=torch.arange(T, dtype=torch.int32),
            row_start=torch.from_numpy(starts),
            weight=torch.ones(T),
            row_dtype=torch.full((S,), 1, dtype=torch.uint8),  # bfloat16
        )
        self.bounds = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        self.adapter = torch.from_numpy(np.repeat(np.arange(S), np.diff(starts)))
        self.x = {
            stack: torch.randn(T, stack_shape(model, stack).in_features, generator=generator)
            for stack in Stack
        }
        self.y = {stack: torch.zeros(T, stack_shape(model, stack).out_features) for stack in Stack}
        self.sets = self._sets(num_sets(working_set_bytes, S * adapter_bytes(model, r)))
        # Float32 takes twice the bytes, so half as many layers are as large a working set.
        layer_bytes = 2 * S * adapter_bytes(model, r) // model.num_layers
        self.dense = [self._dense(one) for one in self.sets[: num_sets(working_set_bytes, layer_bytes)]]
        self.h = {
            stack: lora_shrink(self.x[stack], self.pages, one.rows.a, self.segments)
            for stack, one in self.sets[0].items()
        }

    def _sets(self, num_groups: int) -> list[dict[Stack, StackSet]]:
        """The layers of each group of adapters, group after group."""
        S = self.shape[1]
        stacks, page_bytes = decoder_stacks(self.model), kv_layout(self.model, torch.float32).page_bytes
        first = AdapterPages(torch.empty(0, page_bytes, dtype=torch.uint8), stacks).layout(self._adapter(0))
        order = scattered(num_groups * S * first.num_pages, self.seed).view(num_groups, S, first.num_pages)
        self.pages = page_memory(order.numel(), page_bytes)
        pool = AdapterPages(self.pages, stacks)
        sets: list[dict[Stack, StackSet]] = []
        for group in range(num_groups):
            adapters = [self._adapter(group * S + s) for s in range(S)]
            resident = [
                pool.write(pool.layout(adapter), order[group, s].tolist())
                for s, adapter in enumerate(adapters)
            ]
            sets += self._layers(resident, adapters)
        return sets

    def _adapter(self, number: int) -> Adapter:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return random_adapter(
            base_sites(self.model), self.shape[2], generator, strength=STRENGTH, name=f"adapter-{number}"
        )

    def _layers(
        self, resident: list[ResidentAdapter], adapters: list[Adapter]
    ) -> Iterator[dict[Stack, StackSet]]:
        first_site = [0, *accumulate(len(stack) for stack in decoder_stacks(self.model))]
        tables = AdapterSet(resident, first_site, torch.device("cpu"))
        for layer in range(self.model.num_layers):
            yield {
                stack: self._stack(tables, layer, index, stack, adapters)
                for index, stack in enumerate(Stack)
            }

    def _stack(
        self, tables: AdapterSet, layer: int, index: int, stack: Stack, adapters: list[Adapter]
    ) -> StackSet:
        shape = stack_shape(self.model, stack)
        rows = tables.stack(layer * len(Stack) + index, shape.columns)
        assert rows is not None
        begins, stride = rows.hidden(self.segments)
        sites = []
        for member, site, begin in zip(stack.members, rows.sites, begins, strict=True):
            pairs = [adapter.sites[site_name(layer, member)] for adapter in adapters]
            column = int(site.h_column[0])
            sites.append(
                Site(
                    rows=site,
                    hidden=slice(column, column + self.shape[2]),
                    h_begin=begin,
                    h_stride=stride,
                    stacked_a=torch.stack([pair.lora_a for pair in pairs]),
                    stacked_b=torch.stack([pair.lora_b for pair in pairs]),
                )
            )
        return StackSet(rows, sites)

    def _dense(self, one: dict[Stack, StackSet]) -> dict[Stack, Dense]:
        """Float32 copies of a set's matrices, in the layout that torch multiplies by fastest."""

        def of(stack: StackSet) -> Dense:
            a = torch.cat([site.stacked_a for site in stack.sites], dim=1).float()
            return Dense(
                [matrix.clone().T for matrix in a],
                [[matrix.T.contiguous() for matrix in site.stacked_b.float()] for site in stack.sites],
            )

        return {name: of(stack) for name, stack in one.items()}
