"""The batch of a step against the dense sum of weighted deltas in float64, whatever meets and wherever it lies."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora.lora.adapter import Adapter, AdapterId
from manylora.models.adapter_pages import AdapterPages, ResidentAdapter
from manylora.models.lora_batch import Item, LoraBatch, LoraBatchBuilder, WeightedAdapters
from tests.kernels.cases import POISON, assert_close
from tests.models.paged_adapters import (
    IN_FEATURES,
    OUT_FEATURES,
    SITES,
    STACKS,
    make_adapter,
    poisoned_pool,
)

NUM_PAGES = 400

ADAPTERS = [
    make_adapter(dict.fromkeys(SITES, 4), torch.float32, seed=1),
    make_adapter({"q": 1, "v": 9}, torch.bfloat16, seed=2),
    make_adapter({"down": 3}, torch.float16, seed=3),
    make_adapter({"k": 16, "gate": 2, "up": 5}, torch.float32, seed=4),
    make_adapter({"o": 2, "up": 7, "q": 3}, torch.float16, seed=5),
]
"""Of mixed ranks, sites and dtypes; most leave some stacks alone."""

NOT_IN_O = [adapter.identity for adapter in ADAPTERS if "o" not in adapter.sites]


pytestmark = pytest.mark.usefixtures("one_thread")


class Shelf:
    """A poisoned pool; adapters are put on random pages of it and taken off again."""

    def __init__(self, seed: int = 0) -> None:
        self.pool = poisoned_pool(NUM_PAGES)
        self.pages = AdapterPages(self.pool, STACKS)
        self.builder = LoraBatchBuilder(self.pool, STACKS)
        self.resident: dict[AdapterId, ResidentAdapter] = {}
        self._free = list(range(NUM_PAGES))
        Random(seed).shuffle(self._free)
        self._held: dict[AdapterId, list[int]] = {}
        for adapter in ADAPTERS:
            self.put(adapter)

    def put(self, adapter: Adapter) -> None:
        image = self.pages.layout(adapter)
        held, self._free = self._free[: image.num_pages], self._free[image.num_pages :]
        self._held[adapter.identity] = held
        self.resident[adapter.identity] = self.pages.write(image, held)

    def evict(self, adapter: Adapter) -> None:
        """Its pages are NaN from now on and the last to be given out again."""
        held = self._held.pop(adapter.identity)
        del self.resident[adapter.identity]
        self.pool[torch.tensor(held)] = POISON
        self._free += held

    def build(self, items: list[Item]) -> LoraBatch | None:
        return self.builder.build(items, self.resident)


SHELF = Shelf()
"""Used by every example, so that tables kept from the one before would show."""


def some_items(mixtures: list[WeightedAdapters], counts: list[int]) -> list[Item]:
    items, begin = [], 0
    for mixture, count in zip(mixtures, counts, strict=True):
        items.append(Item(begin, begin + count, mixture))
        begin += count
    return items


def mixed(*parts: tuple[int, float]) -> WeightedAdapters:
    """(number among ADAPTERS, weight) of each part."""
    return tuple((ADAPTERS[number].identity, weight) for number, weight in parts)


some_weights = st.integers(-8, 8).map(lambda eighths: eighths / 4)
"""Exact in float32."""
some_mixtures = st.lists(
    st.tuples(st.integers(0, len(ADAPTERS) - 1), some_weights), max_size=4, unique_by=lambda part: part[0]
).map(lambda parts: mixed(*parts))


@st.composite
def item_lists(draw: st.DrawFn) -> list[Item]:
    """Items whose mixtures come from a few, so that they repeat; some are the base."""
    few = draw(st.lists(some_mixtures, min_size=1, max_size=4))
    mixtures = draw(st.lists(st.sampled_from(few), min_size=1, max_size=8))
    counts = draw(st.lists(st.integers(0, 9), min_size=len(mixtures), max_size=len(mixtures)))
    return some_items(mixtures, counts)


def dense(items: list[Item], stack: int, x: Tensor, adapters: Sequence[Adapter] = ADAPTERS) -> list[Tensor]:
    """What the LoRA adds at each site of the stack: x times the sum of weighted deltas, in float64."""
    by_identity = {adapter.identity: adapter for adapter in adapters}
    result = [x.new_zeros(len(x), OUT_FEATURES[site]) for site in STACKS[stack]]
    for item in items:
        for identity, weight in item.mixture:
            for site, delta in zip(STACKS[stack], result, strict=True):
                pair = by_identity[identity].sites.get(site)
                if pair is not None:
                    delta[item.begin : item.end] += x[item.begin : item.end] @ (weight * pair.delta()).T
    return result


def add(batch: LoraBatch, stack: int, x: Tensor, outputs: list[Tensor]) -> None:
    """Apply the batch to the stacked product of which these are the sites' columns."""
    y, ends = torch.cat(outputs, dim=1), np.cumsum([output.shape[1] for output in outputs]).tolist()
    columns = list(zip([0, *ends[:-1]], ends, strict=True))
    batch.apply(stack, x, y, columns)
    for output, (begin, end) in zip(outputs, columns, strict=True):
        output.copy_(y[:, begin:end])


def check(batch: LoraBatch | None, items: list[Item], adapters: Sequence[Adapter] = ADAPTERS) -> float:
    """Compare the batch with the dense sum at every stack; returns the largest change it should make."""
    num_rows, largest = items[-1].end, 0.0
    for stack, D in enumerate(IN_FEATURES):
        x = torch.randn(num_rows, D, dtype=torch.float64)
        before = [torch.randn(num_rows, OUT_FEATURES[site], dtype=torch.float64) for site in STACKS[stack]]
        outputs = [y.clone() for y in before]
        if batch is not None:
            add(batch, stack, x, outputs)
        added = dense(items, stack, x, adapters)
        for got, y, delta in zip(outputs, before, added, strict=True):
            assert_close(got, y + delta, torch.float64, terms=1000)
            largest = max(largest, delta.abs().max().item() if num_rows else 0.0)
    return largest


def test_the_mixtures_change_the_outputs() -> None:
    items = some_items([mixed((0, 1.0)), (), mixed((1, 0.5), (3, -2.0))], [3, 2, 4])
    batch = SHELF.build(items)
    assert batch is not None
    assert check(batch, items) > 1
    added = [torch.zeros(9, OUT_FEATURES[site], dtype=torch.float64) for site in STACKS[0]]
    add(batch, 0, torch.ones(9, IN_FEATURES[0], dtype=torch.float64), added)
    assert all((delta[3:5] == 0).all() and (delta[:3] != 0).all() for delta in added)


@settings(deadline=None, max_examples=25)
@given(items=item_lists())
def test_equals_the_dense_sum(items: list[Item]) -> None:
    batch = SHELF.build(items)
    assert (batch is None) == all(item.mixture == () for item in items)
    if batch is not None:
        used = {identity for item in items for identity, _ in item.mixture}
        sites = {site for adapter in ADAPTERS if adapter.identity in used for site in adapter.sites}
        assert [batch.touches(k) for k in range(len(STACKS))] == [
            bool(sites & {*stack}) for stack in STACKS
        ]
    check(batch, items)


def test_stacks_that_no_adapter_has_are_left_alone() -> None:
    items = some_items([((identity, 1.0),) for identity in NOT_IN_O], [2] * len(NOT_IN_O))
    batch = SHELF.build(items)
    assert batch is not None
    assert [batch.touches(stack) for stack in range(len(STACKS))] == [True, False, True, True]
    check(batch, items)


def test_a_mixture_is_summed_in_one_order_whoever_is_in_the_batch() -> None:
    """In float32 a + b + c and a + c + b differ."""
    mixture = mixed((0, 1.0), (3, 0.5), (1, -1.5))
    results: list[list[Tensor]] = []
    for others in ([], [mixed((3, 1.0))], [mixed((1, 1.0)), mixed((3, 0.25), (0, 2.0))]):
        batch = SHELF.build(some_items([*others, mixture], [3] * len(others) + [2]))
        assert batch is not None
        results.append([])
        for stack, D in enumerate(IN_FEATURES):
            x = torch.randn(2, D, generator=torch.Generator().manual_seed(stack))
            rows = torch.cat([torch.zeros(3 * len(others), D), x])
            outputs = [torch.ones(len(rows), OUT_FEATURES[site]) for site in STACKS[stack]]
            add(batch, stack, rows, outputs)
            results[-1].append(torch.cat(outputs, dim=1)[-2:])
    assert all((y != 1).any() for y in results[0])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nothing_is_built_for_the_base() -> None:
    assert SHELF.build(some_items([(), ()], [3, 1])) is None
    assert SHELF.build([]) is None


def test_equal_items_use_the_batch_again() -> None:
    mixtures = [mixed((0, 1.0), (2, 0.5)), (), mixed((1, 1.0))]
    first = SHELF.build(some_items(mixtures, [3, 2, 1]))
    assert first is not None
    assert SHELF.build(some_items(mixtures, [3, 2, 1])) is first
    for others in (
        some_items(mixtures, [2, 3, 1]),
        some_items([mixed((0, 1.0), (2, 0.25)), (), mixed((1, 1.0))], [3, 2, 1]),
        some_items([mixed((2, 1.0), (0, 0.5)), (), mixed((1, 1.0))], [3, 2, 1]),
    ):
        batch = SHELF.build(others)
        assert batch is not first
        check(batch, others)


def test_tables_are_kept_while_the_same_adapters_meet() -> None:
    mixtures = [mixed((0, 1.0)), mixed((1, 0.5), (2, 1.0))]
    first = SHELF.build(some_items(mixtures, [1, 1]))
    items = some_items(mixtures, [2, 1])
    longer = SHELF.build(items)
    assert first is not None
    assert longer is not None
    assert longer is not first
    assert longer._adapters is first._adapters
    check(longer, items)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**16), moved=st.sets(st.integers(0, len(ADAPTERS) - 1), min_size=1))
def test_an_adapter_that_was_moved_is_read_where_it_lies(seed: int, moved: set[int]) -> None:
    shelf = Shelf(seed)
    items = some_items([mixed(*((number, 1.0) for number in range(len(ADAPTERS))))], [3])
    stale = shelf.build(items)
    assert stale is not None
    check(stale, items)
    for number in moved:
        shelf.evict(ADAPTERS[number])
    for number in moved:
        shelf.put(ADAPTERS[number])
    # What the old tables point at is NaN now.
    outputs = [
        [torch.zeros(3, OUT_FEATURES[site], dtype=torch.float64) for site in stack] for stack in STACKS
    ]
    for stack, ys in enumerate(outputs):
        add(stale, stack, torch.ones(3, IN_FEATURES[stack], dtype=torch.float64), ys)
    assert any(y.isnan().any() for ys in outputs for y in ys)
    fresh = shelf.build(items)
    assert fresh is not stale
    check(fresh, items)


def test_what_lies_on_an_evicted_adapters_pages_now_is_not_taken_for_it() -> None:
    """The other adapter gets the very pages: equal offsets, other weights."""
    pool = poisoned_pool(NUM_PAGES)
    pages, builder = AdapterPages(pool, STACKS), LoraBatchBuilder(pool, STACKS)
    adapters = [make_adapter({"q": 2}, seed=seed) for seed in (1, 2)]
    offsets = []
    for adapter in adapters:
        image = pages.layout(adapter)
        resident = pages.write(image, range(image.num_pages))
        offsets.append(resident.row_offset)
        items = some_items([((adapter.identity, 1.0),)], [2])
        assert check(builder.build(items, {adapter.identity: resident}), items, adapters) > 1
    assert (offsets[0] == offsets[1]).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_outputs_of_shorter_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    items = some_items([mixed((0, 1.0), (1, -0.5)), mixed((3, 1.5))], [3, 2])
    batch = SHELF.build(items)
    assert batch is not None
    for stack, D in enumerate(IN_FEATURES):
        x = torch.randn(5, D, dtype=torch.float64)
        outputs = [torch.zeros(5, OUT_FEATURES[site], dtype=dtype) for site in STACKS[stack]]
        add(batch, stack, x.to(dtype), outputs)
        for got, want in zip(outputs, dense(items, stack, x), strict=True):
            assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
