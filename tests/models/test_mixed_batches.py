"""A batch of mixtures over stacks of sites, against the dense sum of each row's deltas."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora.lora.adapter import Adapter, AdapterId
from manylora.models.adapter_pages import AdapterPages, ResidentAdapter
from manylora.models.lora_batch import Item, LoraBatchBuilder, WeightedAdapters
from tests.models.test_rank_rows_in_pages import PAGE_BYTES, SHAPES, STACKS, make

NUM_PAGES = 120


class Pool:
    """Some adapters on pages of a pool that is otherwise NaN, so that a stray read shows."""

    def __init__(self, adapters: list[Adapter]) -> None:
        self.storage = torch.full((NUM_PAGES, PAGE_BYTES), 0xFF, dtype=torch.uint8)
        self.pages = AdapterPages(self.storage, STACKS)
        self.builder = LoraBatchBuilder(self.storage, STACKS)
        self.adapters = {adapter.identity: adapter for adapter in adapters}
        self.resident: dict[AdapterId, ResidentAdapter] = {}
        self.next_page = 0
        for adapter in adapters:
            self.load(adapter)

    def load(self, adapter: Adapter) -> None:
        """Onto pages that nobody had before."""
        image = self.pages.layout(adapter)
        ids = range(self.next_page, self.next_page + image.num_pages)
        self.next_page += image.num_pages
        # Backwards, so that the pages of an adapter do not follow one another.
        self.resident[adapter.identity] = self.pages.write(image, [NUM_PAGES - 1 - i for i in ids])

    def wipe(self) -> None:
        self.storage.fill_(0xFF)

    def run(
        self, items: list[Item], num_rows: int, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        """What is added at each site; outputs of a stack are column slices of one tensor."""
        batch = self.builder.build(items, self.resident)
        got: dict[str, Tensor] = {}
        for k, stack in enumerate(STACKS):
            widths = [SHAPES[site][1] for site in stack]
            whole = torch.zeros(num_rows, sum(widths), dtype=dtype)
            outputs = whole.split(widths, dim=1)
            if batch is not None:
                used = {identity for item in items for identity, _ in item.mixture}
                assert batch.touches(k) == any(self.adapters[i].sites.keys() & set(stack) for i in used)
                batch.apply(k, inputs(stack, num_rows).to(dtype), outputs)
            got |= dict(zip(stack, outputs, strict=True))
        return got

    def expected(self, items: list[Item], num_rows: int) -> dict[str, Tensor]:
        want = {
            site: torch.zeros(num_rows, width, dtype=torch.float64) for site, (_, width) in SHAPES.items()
        }
        for item in items:
            for identity, weight in item.mixture:
                for site, pair in self.adapters[identity].sites.items():
                    x = inputs(next(stack for stack in STACKS if site in stack), num_rows)
                    rows = slice(item.begin, item.end)
                    want[site][rows] += weight * x[rows] @ pair.delta().t()
        return want

    def check(self, items: list[Item], num_rows: int) -> None:
        got, want = self.run(items, num_rows), self.expected(items, num_rows)
        for site in SHAPES:
            # Weights and scalings below are exact in float32.
            torch.testing.assert_close(got[site], want[site], rtol=1e-11, atol=1e-11)


def inputs(stack: tuple[str, ...], num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(stack))
    return torch.randn(num_rows, SHAPES[stack[0]][0], generator=generator, dtype=torch.float64)


def items_of(lengths: list[int], mixtures: list[WeightedAdapters]) -> tuple[list[Item], int]:
    items, begin = [], 0
    for length, mixture in zip(lengths, mixtures, strict=True):
        items.append(Item(begin, begin + length, mixture))
        begin += length
    return items, begin


ADAPTER_SPECS = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, 6), min_size=1),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ),
    min_size=1,
    max_size=4,
)
MIXTURES = st.dictionaries(st.integers(0, 3), st.sampled_from([1.0, -0.5, 1.5, 0.25]), max_size=3)


@settings(deadline=None, max_examples=40)
@given(ADAPTER_SPECS, st.lists(st.tuples(st.integers(0, 5), MIXTURES), min_size=1, max_size=7))
def test_any_batch_equals_the_dense_sum(specs, rows):
    adapters = [make(ranks, dtype, seed) for seed, (ranks, dtype) in enumerate(specs)]
    pool = Pool(adapters)
    mixtures = [
        tuple((adapters[i].identity, weight) for i, weight in mixture.items() if i < len(adapters))
        for _, mixture in rows
    ]
    items, num_rows = items_of([length for length, _ in rows], mixtures)
    pool.check(items, num_rows)


def everything() -> Pool:
    return Pool([make(dict.fromkeys(SHAPES, 2 + seed), torch.float32, seed) for seed in range(3)])


def test_a_batch_adds_something_and_its_base_rows_get_nothing():
    pool = everything()
    a, b, _ = pool.adapters
    items, num_rows = items_of([2, 3, 1], [((a, 1.0),), (), ((b, 1.0),)])
    got = pool.run(items, num_rows)
    for site in SHAPES:
        assert got[site][:2].abs().min() > 0
        assert (got[site][2:5] == 0).all()
        assert got[site][5:].abs().min() > 0
    pool.check(items, num_rows)


def test_a_batch_of_the_base_alone_is_none():
    pool = everything()
    assert pool.builder.build([Item(0, 4, ())], pool.resident) is None
    assert pool.builder.build([], pool.resident) is None


def test_tables_are_kept_while_the_same_adapters_meet():
    pool = everything()
    a, b, c = pool.adapters
    mixtures: list[WeightedAdapters] = [((a, 1.0),), ((b, 0.5), (c, 1.0))]
    first = pool.builder.build(items_of([1, 1], mixtures)[0], pool.resident)
    assert first is not None
    assert pool.builder.build(items_of([1, 1], mixtures)[0], pool.resident) is first
    longer = pool.builder.build(items_of([2, 1], mixtures)[0], pool.resident)
    assert longer is not None
    assert longer is not first
    assert longer._adapters is first._adapters
    pool.check(*items_of([2, 1], mixtures))
    pool.check(*items_of([1, 2], [((a, -0.5),), ((b, 1.5), (c, 1.0))]))
    pool.check(*items_of([1, 1], [((b, 1.0),), ((a, 1.0),)]))


def test_an_adapter_loaded_again_elsewhere_is_not_served_from_old_tables():
    pool = everything()
    a, b, _ = pool.adapters
    items, num_rows = items_of([2, 2], [((a, 1.0),), ((b, 1.0),)])
    pool.check(items, num_rows)
    pool.wipe()
    for identity in (a, b):
        pool.load(pool.adapters[identity])
    pool.check(items, num_rows)


def test_what_lies_on_an_evicted_adapters_pages_now_is_not_taken_for_it():
    """b gets the very pages that a had: equal offsets, other adapter."""
    one, other = make({"q": 2}, torch.float32, 1), make({"q": 2}, torch.float32, 2)
    pool = Pool([one])
    pool.check([Item(0, 2, ((one.identity, 1.0),))], 2)
    before = pool.resident.pop(one.identity)
    pool.adapters[other.identity] = other
    pool.next_page = 0
    pool.load(other)
    assert (pool.resident[other.identity].row_offset == before.row_offset).all()
    pool.check([Item(0, 2, ((other.identity, 1.0),))], 2)


def test_float32_and_bfloat16_outputs():
    pool = everything()
    a, b, _ = pool.adapters
    items, num_rows = items_of([3, 2], [((a, 1.0), (b, -0.5)), ((b, 1.5),)])
    want = pool.expected(items, num_rows)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        for site, y in pool.run(items, num_rows, dtype).items():
            error = (y.double() - want[site]).abs().max() / want[site].abs().max()
            assert error < tolerance
