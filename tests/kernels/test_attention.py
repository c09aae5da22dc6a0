"""Paged attention of every backend against torch's attention on the keys and values of each sequence, in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora.kernels import available_backends, grouped_attention, paged_attention, write_kv
from manylora.kernels.ops import BACKENDS
from tests.kernels.cases import POISON, AttentionBatch, assert_close, make_attention_batch

# (context length with the new tokens, new tokens) of each sequence; a page holds 4 tokens.
BATCHES: dict[str, dict[str, Any]] = {
    "one token": {"lengths": [(1, 1)]},
    "one decode": {"lengths": [(11, 1)]},
    "decodes of mixed lengths": {"lengths": [(9, 1), (2, 1), (30, 1), (9, 1), (1, 1)]},
    "decodes of one length": {"lengths": [(7, 1)] * 5},
    "just before, at and after a page's end": {"lengths": [(3, 1), (4, 1), (5, 1), (8, 1), (9, 1)]},
    "prefill": {"lengths": [(13, 13)]},
    "prefills of mixed lengths": {"lengths": [(5, 5), (12, 12), (5, 5), (4, 4)]},
    "chunk after a context": {"lengths": [(20, 6)]},
    "chunks of one size after contexts of several": {"lengths": [(20, 6), (6, 6), (9, 6)]},
    "prefill, chunks and decodes together": {
        "lengths": [(5, 1), (9, 9), (4, 2), (8, 1), (1, 1), (17, 5), (3, 2)]
    },
    "a sequence without new tokens": {"lengths": [(6, 1), (5, 0), (7, 2)]},
    "no sequence": {"lengths": []},
    "as many key heads as query heads": {"lengths": [(9, 1), (6, 3)], "H": 3, "KVH": 3},
    "one key head": {"lengths": [(9, 1), (6, 3)], "H": 5, "KVH": 1},
    "odd head size": {"lengths": [(9, 1), (6, 3)], "HD": 7},
    "one token a page": {"lengths": [(9, 1), (6, 3)], "page_tokens": 1},
    "keys stored shorter than queries": {"lengths": [(9, 1), (6, 3)], "kv_dtype": torch.bfloat16},
    "contexts too unlike to pad": {"lengths": [(3, 1), (700, 1), (5, 1)], "H": 2, "KVH": 1, "HD": 4},
}
FAST = [backend for backend in available_backends() if backend != "reference"]
# The reference is checked where it is exact; from there on it is the measure of the others.
DTYPES = [("reference", torch.float64), *((b, dtype) for b in FAST for dtype in BACKENDS[b].dtypes)]
# The most precise that each backend computes in.
PRECISE = [(b, max(backend.dtypes, key=lambda dtype: dtype.itemsize)) for b, backend in BACKENDS.items()]


def run(batch: AttentionBatch, backend: str) -> Tensor:
    return paged_attention(
        batch.q, batch.pages, batch.layout, batch.layer, batch.sequences, scale=0.3, backend=backend
    )


def attend(batch: AttentionBatch) -> Tensor:
    """The same in float64 from unpaged keys and values, one sequence at a time."""
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    starts = batch.sequences.query_start.tolist()
    for i, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        q = batch.q[starts[i] : starts[i + 1]].double()
        repeats = q.shape[1] // keys.shape[1]
        k, v = (t.double().repeat_interleave(repeats, dim=1) for t in (keys, values))
        scores = torch.einsum("nhd,chd->hnc", q, k) * 0.3
        seen = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        out[starts[i] : starts[i + 1]] = torch.einsum("hnc,chd->nhd", weights, v)
    return out


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
def test_attends_to_each_sequence_alone(name, backend, dtype):
    batch = make_attention_batch(**{**BATCHES[name], "dtype": dtype})
    if batch.q.numel():
        assert batch.pages.view(batch.layout.dtype).isnan().any(), (
            "no poison, so a stray read would not show"
        )

    got = run(batch, backend)

    assert got.dtype == dtype
    assert_close(got, attend(batch), dtype, terms=batch.layout.head_dim + 32)


@pytest.mark.parametrize("tile_tokens", [1, 20])
@pytest.mark.parametrize("name", BATCHES)
def test_tiles_of_any_size_give_the_same(name, tile_tokens, monkeypatch):
    batch = make_attention_batch(**{**BATCHES[name], "dtype": torch.float64})
    monkeypatch.setattr(
        grouped_attention, "TILE_BYTES", tile_tokens * 2 * batch.layout.token_dim * batch.q.itemsize
    )
    assert_close(run(batch, "grouped"), attend(batch), torch.float64, terms=batch.layout.head_dim + 32)


@pytest.mark.parametrize(("backend", "dtype"), PRECISE, ids=str)
def test_a_token_sees_itself_and_nothing_later(backend, dtype):
    batch = make_attention_batch([(6, 6)], dtype=dtype)
    before = run(batch, backend)
    # Another last token: page and slot are those of position 5 of a sequence in pages of 4.
    page = batch.sequences.block_table[0, 1:2].long()
    other = -batch.keys[0][5:6], -batch.values[0][5:6]
    write_kv(*other, batch.pages, batch.layout, batch.layer, page, torch.tensor([1]))
    after = run(batch, backend)
    assert (after[5] - before[5]).abs().max() > 1e-3
    assert torch.equal(after[:5], before[:5])


@pytest.mark.parametrize(("backend", "dtype"), PRECISE, ids=str)
def test_chunks_give_what_one_prefill_gives(backend, dtype):
    whole = make_attention_batch([(14, 14)], dtype=dtype)
    chunk = make_attention_batch([(14, 5)], dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(whole.keys, chunk.keys, strict=True))
    chunk.q.copy_(whole.q[9:])
    assert_close(run(chunk, backend), run(whole, backend)[9:], dtype, terms=64)


@pytest.mark.parametrize(("backend", "dtype"), PRECISE, ids=str)
def test_every_layer_reads_its_own_plane(backend, dtype):
    """The sequences are kept from layer to layer; only the plane may change."""
    batch = make_attention_batch([(9, 1), (5, 2)], dtype=dtype, layer=0)
    token = torch.arange(9)
    slot_page = batch.sequences.block_table[0, token // 4].long()
    write_kv(batch.keys[0], -batch.values[0], batch.pages, batch.layout, 2, slot_page, token % 4)
    first = run(batch, backend)
    last = paged_attention(
        batch.q, batch.pages, batch.layout, 2, batch.sequences, scale=0.3, backend=backend
    )
    assert first[0].abs().max() > 0.1
    assert_close(last[0], -first[0], dtype, terms=64)
    assert last[1:].isnan().all(), "nothing was written for the second sequence in this layer"


@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
@pytest.mark.parametrize("backend", FAST)
def test_sequences_may_be_used_in_and_out_of_inference_mode(modes, backend):
    batch = make_attention_batch(**BATCHES["keys stored shorter than queries"])
    results = []
    for mode in modes:
        with mode():
            results.append(run(batch, backend))
    assert results[0].abs().max() > 0
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_kv_fills_its_slots_and_no_other(kv_dtype, backend):
    batch = make_attention_batch([(6, 1)], kv_dtype=kv_dtype)
    k, v = torch.randn(2, 2, 2, 16).unbind(0)
    pages = torch.full_like(batch.pages, POISON)
    write_kv(k, v, pages, batch.layout, 1, torch.tensor([3, 0]), torch.tensor([2, 1]), backend=backend)
    planes = batch.layout.planes(pages, 1)
    assert torch.equal(planes[3, :, 2], torch.stack([k[0], v[0]]).to(kv_dtype))
    assert torch.equal(planes[0, :, 1], torch.stack([k[1], v[1]]).to(kv_dtype))
    assert (pages != POISON).sum() <= 2 * k.nbytes
    planes[3, :, 2] = planes[0, :, 1] = torch.nan
    assert pages.view(kv_dtype).isnan().all()


@pytest.mark.parametrize("backend", FAST)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_random_batches(backend, data):
    contexts = data.draw(st.lists(st.integers(1, 40), max_size=6))
    lengths = [(context, data.draw(st.integers(0, min(context, 9)))) for context in contexts]
    batch = make_attention_batch(
        lengths,
        page_tokens=data.draw(st.integers(1, 8)),
        KVH=data.draw(st.sampled_from([1, 2, 3])),
        num_layers=data.draw(st.integers(2, 3)),
        seed=data.draw(st.integers(0, 99)),
    )
    assert_close(run(batch, backend), attend(batch), torch.float32, terms=64)
