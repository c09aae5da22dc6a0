"""Shrink, expand, and both, of all sites of a layer, on real adapters in scattered pages.

Implementations: ours; torch (the grouped kernels, on the same pages); gather (a whole adapter per row); and dense,
which is no LoRA kernel but torch's product of float32 weights at the rows of one adapter: a rate to compare with.

Every call is on another layer, and after the last on the first one of other adapters.
"""

# Shapes: T rows, S adapters of one rank r.

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from manylora.bench.kernels.case import Arm, Case, Work
from manylora.bench.kernels.config import KernelsConfig, numbers_of
from manylora.bench.kernels.gather import gather_expand, gather_shrink
from manylora.bench.kernels.lora_data import LoraData
from manylora.kernels import add_lora, available_backends, lora_expand, lora_shrink, native
from manylora.models.config import LlamaConfig
from manylora.models.sites import Stack, stack_shape


class LoraCalls:
    """Each implementation on set number i, and its answer in the form that all share."""

    def __init__(self, data: LoraData) -> None:
        self.data = data

    def shrink(self, i: int, backend: str) -> list[Tensor]:
        return [
            lora_shrink(
                self.data.x[stack], self.data.pages, one.rows.a, self.data.segments, backend=backend
            )
            for stack, one in self.data.sets[i].items()
        ]

    def expand(self, i: int, backend: str) -> None:
        for (stack, one), h in zip(self.data.sets[i].items(), self.data.h.values(), strict=True):
            for site in one.sites:
                rows = site.rows
                lora_expand(
                    self.data.y[stack][:, slice(*rows.columns)], h, self.data.pages, rows.b, self.data.segments,
                    site.h_begin, site.h_stride, rows.scaling, backend=backend,
                )  # fmt: skip

    def bound_lora(self, i: int) -> None:
        """The native kernel with its addresses at hand, as the native code that runs a step has them."""
        for call in self._bound[i]:
            call()

    @cached_property
    def _bound(self) -> list[list[Callable[[], None]]]:
        data = self.data
        return [
            [
                native.bound_lora(data.y[stack], data.x[stack], data.pages, one.rows, data.segments)
                for stack, one in layer.items()
            ]
            for layer in data.sets
        ]

    def lora(self, i: int, backend: str) -> None:
        for stack, one in self.data.sets[i].items():
            add_lora(
                self.data.y[stack],
                self.data.x[stack],
                self.data.pages,
                one.rows,
                self.data.segments,
                backend=backend,
            )

    def gather_shrink(self, i: int) -> list[Tensor]:
        """One [T, r] for each site."""
        return [
            gather_shrink(self.data.x[stack], site.stacked_a, self.data.adapter)
            for stack, one in self.data.sets[i].items()
            for site in one.sites
        ]

    def gather_expand(self, i: int) -> None:
        self._gather_expand(i, self._hidden_by_site(i))

    def gather_lora(self, i: int) -> None:
        self._gather_expand(i, self.gather_shrink(i))

    def _gather_expand(self, i: int, hidden: list[Tensor]) -> None:
        parts = iter(hidden)
        for stack, one in self.data.sets[i].items():
            for site in one.sites:
                gather_expand(
                    self.data.y[stack][:, slice(*site.rows.columns)],
                    next(parts),
                    site.stacked_b,
                    self.data.adapter,
                )

    def _hidden_by_site(self, i: int) -> list[Tensor]:
        T = self.data.shape[0]
        return [
            self.data.h[stack].view(T, -1)[:, site.hidden]
            for stack, one in self.data.sets[i].items()
            for site in one.sites
        ]

    def dense_shrink(self, i: int) -> list[Tensor]:
        hidden = []
        for stack, dense in self.data.dense[i].items():
            h = self.data.h[stack].new_empty(self.data.shape[0], dense.a[0].shape[1])
            for (begin, end), a in zip(self.data.bounds, dense.a, strict=True):
                torch.mm(self.data.x[stack][begin:end], a, out=h[begin:end])
            hidden.append(h)
        return hidden

    def dense_expand(self, i: int) -> None:
        parts = iter(self._hidden_by_site(i))
        for stack, dense in self.data.dense[i].items():
            for site, matrices in zip(self.data.sets[i][stack].sites, dense.b, strict=True):
                h, y = next(parts), self.data.y[stack][:, slice(*site.rows.columns)]
                for (begin, end), b in zip(self.data.bounds, matrices, strict=True):
                    y[begin:end].addmm_(h[begin:end], b)

    # -- their answers

    def hidden(self, parts: list[Tensor]) -> Tensor:
        """What a shrink returned, with the rows of a stack side by side as ours has them."""
        return torch.cat([part.flatten() for part in parts])

    def hidden_of_sites(self, parts: list[Tensor]) -> Tensor:
        """The same of one [T, r] for each site."""
        left = iter(parts)
        stacks = [torch.cat([next(left) for _ in one.sites], dim=1) for one in self.data.sets[0].values()]
        return self.hidden(stacks)

    def added(self, work: partial[None]) -> Tensor:
        """What a call adds to every y."""
        for y in self.data.y.values():
            y.zero_()
        work()
        return torch.cat([y.flatten() for y in self.data.y.values()])


def lora_cases(config: KernelsConfig, model: LlamaConfig, working_set_bytes: int) -> Iterator[Case]:
    """The cases of every batch in `config.lora`; the data of one batch are let go before the next."""
    for text in config.lora:
        T, S, r = numbers_of("lora", "rows:adapters:rank", text)
        calls = LoraCalls(LoraData(model, (T, S, r), working_set_bytes, config.seed))
        for kernel in ("shrink", "expand", "lora"):
            if kernel in config.kernels:
                yield Case(kernel, text, _work(kernel, model, T, S, r), _arms(kernel, calls))
        del calls


def _work(kernel: str, model: LlamaConfig, T: int, S: int, r: int) -> Work:
    """Of one layer: the rank rows of each adapter once. Activations are in cache, as they are in a step."""
    shapes = [stack_shape(model, stack) for stack in Stack]
    widths = {
        "shrink": sum(shape.in_features * len(shape.columns) for shape in shapes),
        "expand": sum(shape.out_features for shape in shapes),
    }
    width = widths.get(kernel, sum(widths.values()))
    return Work(num_bytes=2 * S * r * width, flops=2 * T * r * width, product_rows=max(1, T // S))


def _arms(kernel: str, calls: LoraCalls) -> dict[str, Arm]:
    best, n = available_backends()[0], len(calls.data.sets)
    if kernel == "shrink":
        return {
            "ours": Arm(
                partial(calls.shrink, backend=best), n, lambda: calls.hidden(calls.shrink(0, best))
            ),
            "torch": Arm(
                partial(calls.shrink, backend="grouped"),
                n,
                lambda: calls.hidden(calls.shrink(0, "grouped")),
            ),
            "gather": Arm(calls.gather_shrink, n, lambda: calls.hidden_of_sites(calls.gather_shrink(0)), 1),
            "dense": Arm(
                calls.dense_shrink, len(calls.data.dense), lambda: calls.hidden(calls.dense_shrink(0)), 1
            ),
        }
    ours = calls.expand if kernel == "expand" else calls.lora
    gather = calls.gather_expand if kernel == "expand" else calls.gather_lora
    if kernel == "lora" and best == "native":
        own = Arm(calls.bound_lora, n, lambda: calls.added(partial(calls.bound_lora, 0)))
    else:
        own = Arm(partial(ours, backend=best), n, lambda: calls.added(partial(ours, 0, best)))
    arms = {
        "ours": own,
        "torch": Arm(partial(ours, backend="grouped"), n, lambda: calls.added(partial(ours, 0, "grouped"))),
        "gather": Arm(gather, n, lambda: calls.added(partial(gather, 0)), 1),
    }
    if kernel == "expand":
        arms["dense"] = Arm(
            calls.dense_expand,
            len(calls.data.dense),
            lambda: calls.added(partial(calls.dense_expand, 0)),
            1,
        )
    return arms
