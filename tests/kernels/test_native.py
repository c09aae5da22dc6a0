"""What only the native kernels promise: each instruction set gives the answer, and a row's bits are its own."""

import importlib.util
import itertools
import sys
from dataclasses import replace

import pytest
import torch

from manylora.kernels import RankRows, Segments, lora_expand, lora_shrink, native, ops, paged_attention
from manylora.kernels.native import _core
from tests.kernels import test_attention, test_lora
from tests.kernels.cases import LoraBatch, assert_close, make_attention_batch, make_lora_batch


def test_the_widest_instruction_set_is_used():
    assert _core.isa() == _core.isas()[0]
    assert _core.isas()[-1] == "portable"


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no instruction set sse9"):
        _core.use_isa("sse9")


@pytest.mark.parametrize("name", test_lora.BATCHES)
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_lora_of_every_instruction_set(isa, name, row_dtype):
    batch = make_lora_batch(**{**test_lora.BATCHES[name], "row_dtypes": [row_dtype]})
    assert (batch.delta().abs().sum() > 0) == test_lora.has_effect(batch)
    got = test_lora.run(batch, "native")
    assert_close(got, batch.delta(), torch.float32, test_lora.num_terms(batch))


@pytest.mark.parametrize("name", test_attention.BATCHES)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_of_every_instruction_set(isa, name, kv_dtype):
    batch = make_attention_batch(**{**test_attention.BATCHES[name], "kv_dtype": kv_dtype})
    got = test_attention.run(batch, "native")
    assert_close(got, test_attention.attend(batch), torch.float32, terms=batch.layout.head_dim + 32)


@pytest.mark.parametrize("rank", range(1, 130))
def test_every_rank_with_one_and_with_many_rows(rank):
    batch = make_lora_batch(segments=[[0], [1, 2, 3, 4, 5]], ranks=[rank, rank], D=70, O=45)
    assert batch.delta().abs().min(dim=1).values.max() > 0
    assert_close(test_lora.run(batch, "native"), batch.delta(), torch.float32, test_lora.num_terms(batch))


@pytest.mark.parametrize(
    "value", [0x0001, 0x03FF, 0x0400, 0x7BFF, 0x7C00, 0x7E00, 0x8001, 0xFC00, 0x3C00], ids=hex
)
def test_every_kind_of_half_is_read_as_torch_reads_it(isa, value):
    """Subnormal, normal, largest, infinite, not a number; 48 columns, so that all lanes are used."""
    row = torch.full((48,), value, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    batch = make_lora_batch(segments=[[0]], ranks=[1], O=48, row_dtypes=[torch.float16])
    begin = int(batch.b.offset[batch.b.begin[0]])
    batch.pages.view(-1)[begin : begin + row.nbytes] = row.view(torch.uint8)
    y = torch.zeros_like(batch.y)
    lora_expand(
        y, torch.ones(1), batch.pages, batch.b, batch.segments, batch.h_begin, batch.h_stride, torch.ones(1),
        backend="native",
    )  # fmt: skip
    torch.testing.assert_close(y[0], row.float(), rtol=0, atol=0, equal_nan=True)


def test_exponential_is_precise_over_its_whole_range(isa):
    """Through silu: x / (1 + e^-x)."""
    x = torch.linspace(-87, 87, 100_001)
    got = ops.silu_mul(torch.stack([x, torch.ones_like(x)]).T.reshape(-1, 2).contiguous(), backend="native")
    want = torch.nn.functional.silu(x.double())
    assert ((got[:, 0].double() - want).abs() <= 4e-7 * want.abs()).all()


# -- the bits of a row


def pick(batch: LoraBatch, segment: int, entries: slice) -> LoraBatch:
    """The batch of these entries of one segment alone."""
    begin, end = batch.segments.row_start[segment : segment + 2].tolist()
    rows = batch.segments.rows[begin:end][entries]
    one = slice(segment, segment + 1)

    def table(rank_rows: RankRows) -> RankRows:
        return RankRows(rank_rows.offset, rank_rows.begin[one].clone(), rank_rows.end[one].clone())

    segments = Segments(
        rows=rows.clone(),
        row_start=torch.tensor([0, len(rows)], dtype=torch.int32),
        weight=batch.segments.weight[begin:end][entries].clone(),
        row_dtype=batch.segments.row_dtype[one].clone(),
    )
    stride = batch.h_stride[one].clone()
    return replace(
        batch, a=table(batch.a), b=table(batch.b), segments=segments, h_begin=torch.zeros(1, dtype=torch.int64),
        h_stride=stride, scaling=batch.scaling[one].clone(),
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 5, 16, 23])
@pytest.mark.parametrize("threads", [1, 2])
def test_lora_bits_of_a_row_do_not_depend_on_the_batch(isa, rank, threads):
    batch = make_lora_batch(
        segments=[list(range(7)), list(range(7, 80))],
        ranks=[rank, rank],
        D=75,
        O=83,
        row_dtypes=[torch.bfloat16],
    )
    before = torch.get_num_threads()
    together = test_lora.run(batch, "native")
    try:
        torch.set_num_threads(threads)
        for segment, entry in [(0, 0), (0, 6), (1, 0), (1, 41), (1, 72)]:
            alone = pick(batch, segment, slice(entry, entry + 1))
            row = int(alone.segments.rows[0])
            assert together[row].abs().max() > 0
            assert torch.equal(test_lora.run(alone, "native")[row], together[row])
    finally:
        torch.set_num_threads(before)


def test_attention_bits_of_a_row_do_not_depend_on_the_batch(isa):
    lengths = [(9, 1), (70, 33), (4, 4), (33, 1), (16, 7)]
    batch = make_attention_batch(lengths, H=6, KVH=2, HD=20, page_tokens=8)
    together = test_attention.run(batch, "native")
    starts = batch.sequences.query_start.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        for row in {begin, (begin + end) // 2, end - 1}:
            alone = replace(
                batch.sequences,
                block_table=batch.sequences.block_table[i : i + 1].clone(),
                query_start=torch.tensor([0, 1], dtype=torch.int32),
                context_len=batch.sequences.context_len[i : i + 1] - (end - 1 - row),
            )
            got = paged_attention(
                batch.q[row : row + 1],
                batch.pages,
                batch.layout,
                batch.layer,
                alone,
                scale=0.3,
                backend="native",
            )
            assert got.abs().max() > 0
            assert torch.equal(got[0], together[row])


def test_rowwise_bits_do_not_depend_on_the_batch(isa):
    x = torch.randn(50, 74, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(74, generator=torch.Generator().manual_seed(1))
    normed = ops.add_rms_norm(x, None, weight, 1e-5, backend="native")
    gated = ops.silu_mul(x, backend="native")
    for row in (0, 17, 49):
        one = x[row : row + 1]
        assert torch.equal(ops.add_rms_norm(one, None, weight, 1e-5, backend="native")[0], normed[row])
        assert torch.equal(ops.silu_mul(one, backend="native")[0], gated[row])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_lora_at_once_has_the_bits_of_one_after_the_other(isa, threads):
    """`test_lora.run` compares them: rows once and several times, fewer tasks than threads and more."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in test_lora.BATCHES.values():
            test_lora.run(make_lora_batch(**batch), "native")
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_work_change_nothing():
    batch = make_lora_batch(segments=[[0, 1], [2]], ranks=[3, 9], D=33, O=17)
    one = test_lora.run(batch, "native")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        many = test_lora.run(batch, "native")
    finally:
        torch.set_num_threads(before)
    assert one.abs().max() > 0
    assert torch.equal(one, many)


def test_h_of_a_shrink_is_read_by_an_expand_of_another_backend():
    batch = make_lora_batch(segments=[[0, 1, 2], [3]], ranks=[4, 7])
    h = {
        name: lora_shrink(batch.x, batch.pages, batch.a, batch.segments, backend=name)
        for name in ("native", "grouped")
    }
    assert_close(h["native"], h["grouped"].double(), torch.float32, test_lora.num_terms(batch))


def test_without_the_binary_the_package_says_so_and_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "manylora.kernels.native._core", None)
    monkeypatch.delattr(native, "_core")
    assert native.__file__ is not None
    spec = importlib.util.spec_from_file_location("native_without_binary", native.__file__)
    assert spec is not None
    assert spec.loader is not None
    spare = importlib.util.module_from_spec(spec)
    with pytest.warns(RuntimeWarning, match=r"not built .*Install a C\+\+ compiler"):
        spec.loader.exec_module(spare)
    assert native.AVAILABLE
    assert not spare.AVAILABLE
