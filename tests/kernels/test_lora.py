"""Shrink and expand of every backend against dense matrices in float64 and against the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora.kernels import (
    SiteRows,
    StackRows,
    add_lora,
    available_backends,
    hidden_layout,
    lora_expand,
    lora_shrink,
    tiles,
)
from manylora.kernels.ops import BACKENDS
from tests.kernels.cases import LoraBatch, assert_close, make_lora_batch, store_rank_rows

BATCHES: dict[str, dict[str, Any]] = {
    "one row": {"segments": [[0]], "ranks": [8]},
    "one adapter a row": {"segments": [[i] for i in range(33)], "ranks": [8] * 33},
    "ragged, mixed ranks": {"segments": [[0, 1, 2, 3, 4], [7], list(range(9, 42))], "ranks": [1, 7, 64]},
    "equal lengths, ranks by turns": {
        "segments": [[i, i + 1] for i in range(0, 24, 2)],
        "ranks": [4, 4, 9] * 4,
    },
    "mixtures: rows in several segments": {
        "segments": [[0, 1, 2], [2, 0, 5], [1], [1]],
        "ranks": [16, 16, 3, 3],
        "weights": [0.5, -1.25, 2.0],
    },
    "one adapter twice in a row's mixture": {
        "segments": [[3, 3], [3, 3]],
        "ranks": [2, 2],
        "weights": [1.0, 0.25],
    },
    "rows not in order": {"segments": [[5, 2], [0, 9]], "ranks": [17, 17]},
    "rank rows scattered over pages": {
        "segments": [[5, 2], [0], [1]],
        "ranks": [17, 3, 3],
        "shuffle_pages": True,
    },
    "no segment": {"segments": [], "ranks": []},
    "segments without entries": {"segments": [[], [0, 1], [], [2]], "ranks": [4, 4, 4, 4]},
    "adapters that skip this site": {"segments": [[0], [1], [2], [3]], "ranks": [0, 5, 0, 5]},
    "no adapter has this site": {"segments": [[0], [1, 2]], "ranks": [0, 0]},
    "rows without adapter": {"segments": [[3], [1]], "ranks": [8, 8], "num_rows": 12},
    "odd width": {"segments": [[0, 1], [2, 3], [4]], "ranks": [3, 3, 3], "D": 37, "O": 29},
    "odd width, two-byte rows anywhere": {
        "segments": [[0], [1], [2, 3]],
        "ranks": [3, 3, 5],
        "D": 37,
        "O": 29,
        "row_dtypes": [torch.bfloat16],
        "shuffle_pages": True,
    },
    "rank rows of every dtype": {
        "segments": [[i] for i in range(9)],
        "ranks": [6] * 9,
        "row_dtypes": [torch.float32, torch.bfloat16, torch.float16, torch.int8],
    },
    "one rank row of eight bits": {
        "segments": [[0, 1]],
        "ranks": [1],
        "D": 37,
        "O": 37,
        "row_dtypes": [torch.int8],
    },
    "rank rows of eight bits": {
        "segments": [[5, 2], [0], [1], [3, 4, 6, 7, 8]],
        "ranks": [17, 3, 3, 8],
        "D": 37,
        "row_dtypes": [torch.int8],
        "shuffle_pages": True,
    },
}


def run(batch: LoraBatch, backend: str) -> Tensor:
    """What a backend adds to y: the same bits at once and one after the other."""
    h = lora_shrink(batch.x, batch.pages, batch.a, batch.segments, backend=backend)
    y = batch.y.clone()
    lora_expand(
        y,
        h,
        batch.pages,
        batch.b,
        batch.segments,
        batch.h_begin,
        batch.h_stride,
        batch.scaling,
        backend=backend,
    )
    at_once = batch.y.clone()
    add_lora(at_once, batch.x, batch.pages, batch.stack, batch.segments, backend=backend)
    assert torch.equal(at_once, y)
    return y - batch.y


FAST = [backend for backend in available_backends() if backend != "reference"]
# The reference is checked where it is exact; from there on it is the measure of the others.
DTYPES = [("reference", torch.float64), *((b, dtype) for b in FAST for dtype in BACKENDS[b].dtypes)]


def num_terms(batch: LoraBatch) -> int:
    return batch.x.shape[1] + max((len(a) for a in batch.lora_a), default=0)


def has_effect(batch: LoraBatch) -> bool:
    """Whether some row has an adapter with rank rows here, so that y must change."""
    return any(n and r for n, r in zip(batch.segments.num_entries, batch.a.rank, strict=True))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
def test_adds_the_lora_of_each_row(name, backend, dtype):
    batch = make_lora_batch(**BATCHES[name], dtype=dtype)
    want = batch.delta()
    assert (want.abs().sum() > 0) == has_effect(batch)

    got = run(batch, backend)

    untouched = ~torch.isin(torch.arange(len(got)), batch.segments.rows)
    assert (got[untouched] == 0).all()
    assert_close(got, want, dtype, num_terms(batch))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_reference_of_higher_precision(name, backend):
    batch = make_lora_batch(**BATCHES[name])
    exact = batch.double()

    h = lora_shrink(batch.x, batch.pages, batch.a, batch.segments, backend=backend)
    want = lora_shrink(exact.x, exact.pages, exact.a, exact.segments, backend="reference")

    assert h.dtype == torch.float32
    assert (want.numel() > 0) == has_effect(batch)
    assert_close(h, want, torch.float32, num_terms(batch))


@pytest.mark.parametrize("tile_rows", [1, 5, 16])
@pytest.mark.parametrize("name", BATCHES)
def test_tiles_of_any_size_give_the_same(name, tile_rows, monkeypatch):
    batch = make_lora_batch(**BATCHES[name], dtype=torch.float64)
    assert (batch.delta().abs().sum() > 0) == has_effect(batch)
    monkeypatch.setattr(tiles, "TILE_BYTES", tile_rows * batch.x.shape[1] * batch.x.itemsize)
    assert_close(run(batch, "grouped"), batch.delta(), torch.float64, num_terms(batch))


@pytest.mark.parametrize("backend", available_backends())
def test_every_rank(backend):
    ranks = [*range(1, 66)]
    batch = make_lora_batch(segments=[[i] for i in range(65)], ranks=ranks, shuffle_pages=True)
    want = batch.delta()
    assert (want.abs().amax(dim=1) > 0).all()
    assert_close(run(batch, backend), want, torch.float32, num_terms(batch))


@pytest.mark.parametrize("backend", FAST)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_random_batches(backend, data):
    num_segments = data.draw(st.integers(0, 6), label="segments")
    segments = [data.draw(st.lists(st.integers(0, 9), max_size=5)) for _ in range(num_segments)]
    batch = make_lora_batch(
        segments=segments,
        ranks=data.draw(
            st.lists(st.sampled_from([0, 1, 2, 8]), min_size=num_segments, max_size=num_segments)
        ),
        row_dtypes=data.draw(st.sampled_from([[torch.float32], [torch.bfloat16, torch.float16]])),
        weights=data.draw(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4)),
        shuffle_pages=data.draw(st.booleans()),
        D=data.draw(st.integers(1, 20)),
        num_rows=10,
        seed=data.draw(st.integers(0, 99)),
    )
    assert_close(run(batch, backend), batch.delta(), torch.float32, num_terms(batch))


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("columns", [slice(0, 40), slice(40, 80), slice(3, 43)], ids=str)
@pytest.mark.parametrize(
    "name", ["one row", "one adapter a row", "ragged, mixed ranks", "rows not in order"]
)
def test_adds_to_a_column_slice_and_nothing_beside_it(name, columns, backend):
    batch = make_lora_batch(**BATCHES[name])
    wide = torch.zeros(len(batch.y), 3 * batch.y.shape[1])
    h = lora_shrink(batch.x, batch.pages, batch.a, batch.segments, backend=backend)

    lora_expand(
        wide[:, columns],
        h,
        batch.pages,
        batch.b,
        batch.segments,
        batch.h_begin,
        batch.h_stride,
        batch.scaling,
        backend=backend,
    )

    assert batch.delta().abs().max() > 0
    assert_close(wide[:, columns], batch.delta(), torch.float32, num_terms(batch))
    wide[:, columns] = 0
    assert (wide == 0).all()


@pytest.mark.parametrize("backend", available_backends())
def test_a_stack_of_sites_shares_one_shrink(backend):
    """q, k, v as the decoder calls them: one shrink of their stacked A, three expands that take their columns of h."""
    segments, ranks = [[0, 1], [2, 3], [4]], {"q": [4, 4, 2], "k": [0, 3, 2], "v": [5, 4, 0]}
    sites = {
        name: make_lora_batch(segments=segments, ranks=r, seed=i)
        for i, (name, r) in enumerate(ranks.items())
    }
    first = sites["q"]
    stacked = [torch.cat([site.lora_a[s] for site in sites.values()]) for s in range(len(segments))]
    pages, (a,) = store_rank_rows([stacked], 4096)

    h = lora_shrink(first.x, pages, a, first.segments, backend=backend)

    begin, stride = hidden_layout(a, first.segments)
    column = torch.zeros(len(segments), dtype=torch.int64)
    for name, site in sites.items():
        y = torch.zeros_like(site.y)
        lora_expand(
            y, h, site.pages, site.b, first.segments, begin + column, stride, site.scaling, backend=backend
        )
        want = LoraBatch(**{**vars(site), "x": first.x}).delta()
        assert want.abs().max() > 0
        assert_close(y, want, torch.float32, num_terms(site))
        column += torch.tensor(ranks[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "segments", [[[0, 1], [2, 3, 5, 6, 7], [4]], [[0, 1], [1, 3, 5, 6, 7], [4]]], ids=["once", "mixture"]
)
@pytest.mark.parametrize("backend", available_backends())
def test_a_stack_is_added_at_once(segments, dtype, backend):
    """q, k, v: their columns of one y, and nothing beside them."""
    ranks = {"q": [4, 4, 2], "k": [0, 3, 2], "v": [5, 4, 0]}
    sites = [
        make_lora_batch(segments=segments, ranks=r, row_dtypes=[dtype], O=40 - 8 * i, seed=i)
        for i, r in enumerate(ranks.values())
    ]
    stacked = [torch.cat([site.lora_a[s] for site in sites]) for s in range(len(segments))]
    pages, (a, *tables) = store_rank_rows([stacked, *([b.T for b in site.lora_b] for site in sites)], 4096)
    begins, columns = [0, 43, 80], torch.zeros(len(segments), dtype=torch.int32)
    rows = []
    for begin, b, site, rank in zip(begins, tables, sites, ranks.values(), strict=True):
        rows.append(SiteRows((begin, begin + site.y.shape[1]), b, columns.clone(), site.scaling))
        columns += torch.tensor(rank, dtype=torch.int32)
    x = sites[0].x.float()
    y = torch.ones(len(x), 110)

    add_lora(y, x, pages, StackRows.of(a, rows), sites[0].segments, backend=backend)

    want = torch.zeros(y.shape, dtype=torch.float64)
    for row, site in zip(rows, sites, strict=True):
        want[:, slice(*row.columns)] = LoraBatch(**{**vars(site), "x": x}).delta()
    assert want.abs().max() > 0
    assert_close(y - 1, want, torch.float32, sum(map(num_terms, sites)))
    assert (y[:, want.abs().sum(dim=0) == 0] == 1).all()


@pytest.mark.parametrize("backend", FAST)
def test_a_stack_serves_one_batch_after_another(backend):
    """Other rows and weights, another pool, and back: nothing that was derived for one may serve the next."""
    batch = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 7])
    others = [
        replace(batch, segments=make_lora_batch([[1], [0, 2]], [4, 7], weights=[0.5, -2.0]).segments),
        replace(batch, pages=torch.cat([batch.pages, batch.pages])),
        batch,
    ]
    stack = batch.stack
    for one in others:
        y = one.y.clone()
        add_lora(y, one.x, one.pages, stack, one.segments, backend=backend)
        assert one.delta().abs().max() > 0
        assert_close(y - one.y, one.delta(), torch.float32, num_terms(one))


@pytest.mark.parametrize("backend", available_backends())
def test_negating_every_weight_negates_the_result(backend):
    plus = make_lora_batch(**BATCHES["ragged, mixed ranks"], weights=[1.5])
    minus = make_lora_batch(**BATCHES["ragged, mixed ranks"], weights=[-1.5])
    assert run(plus, backend).abs().max() > 1
    assert_close(run(minus, backend), -run(plus, backend), torch.float32, num_terms(plus))


@pytest.mark.parametrize("backend", FAST)
def test_a_row_is_the_same_whoever_stands_beside_it(backend):
    """Requests join and leave a batch; the answer of the others must stay what it was up to rounding."""
    together = make_lora_batch(segments=[[0], [1], [2]], ranks=[8, 8, 8])
    y = run(together, backend)
    x, pages, a, b = together.x, together.pages, together.a, together.b
    for s in range(3):
        one = make_lora_batch(segments=[[0]], ranks=[8])
        alone = LoraBatch(
            **{
                **vars(one),
                "x": x[s : s + 1],
                "pages": pages,
                "a": type(a)(a.offset, a.begin[s : s + 1], a.end[s : s + 1]),
                "b": type(b)(b.offset, b.begin[s : s + 1], b.end[s : s + 1]),
                "scaling": together.scaling[s : s + 1],
            }
        )
        assert y[s].abs().max() > 0
        assert_close(run(alone, backend), y[s : s + 1], torch.float32, num_terms(together))


@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
@pytest.mark.parametrize("backend", FAST)
def test_records_may_be_used_in_and_out_of_inference_mode(modes, backend):
    batch = make_lora_batch(**BATCHES["rank rows of every dtype"])
    results = []
    for mode in modes:
        with mode():
            results.append(run(batch, backend))
    assert results[0].abs().max() > 0
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", FAST)
def test_records_may_be_used_again_with_other_activations_and_pages(backend):
    """An engine keeps its records while the batch stays; what a backend keeps on them must not keep a result."""
    batch = make_lora_batch(**BATCHES["ragged, mixed ranks"])
    before = run(batch, backend)
    batch.x.mul_(2)
    assert_close(run(batch, backend), 2 * before, torch.float32, num_terms(batch))
    moved = LoraBatch(**{**vars(batch), "pages": batch.pages.clone()})
    batch.pages.fill_(0)
    assert_close(run(moved, backend), 2 * before, torch.float32, num_terms(batch))
    assert (run(batch, backend) == 0).all()
