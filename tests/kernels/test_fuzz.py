"""The native kernels of every instruction set on shapes that nobody chose, against the reference in float64."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora.kernels import (
    FLOAT_ROW_DTYPES,
    ROW_DTYPES,
    add_lora,
    lora_expand,
    lora_shrink,
    ops,
    paged_attention,
    rowwise,
    write_kv,
)
from manylora.kernels.native.int8 import Int8Weight
from tests.kernels.cases import LoraBatch, assert_close, make_attention_batch, make_lora_batch
from tests.kernels.test_lora import num_terms

# The fixture only chooses the kernels, the same for all examples of a test.
fuzz = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

WIDTHS = st.integers(1, 200)
RANKS = st.one_of(st.integers(0, 9), st.integers(10, 130))
SEEDS = st.integers(0, 10_000)


def run(batch: LoraBatch, backend: str) -> tuple[Tensor, Tensor]:
    """(h, what is added to y)."""
    h = lora_shrink(batch.x, batch.pages, batch.a, batch.segments, backend=backend)
    y = torch.zeros_like(batch.y)
    lora_expand(
        y, h, batch.pages, batch.b, batch.segments, batch.h_begin, batch.h_stride, batch.scaling, backend=backend
    )  # fmt: skip
    at_once = torch.zeros_like(batch.y)
    add_lora(at_once, batch.x, batch.pages, batch.stack, batch.segments, backend=backend)
    assert torch.equal(at_once, y)
    return h, y


@st.composite
def lora_batches(draw: Any) -> LoraBatch:
    num_rows = draw(st.integers(1, 90))
    rows = st.lists(st.integers(0, num_rows - 1), max_size=80)
    segments = draw(st.lists(rows, max_size=4))
    return make_lora_batch(
        segments=segments,
        ranks=draw(st.lists(RANKS, min_size=len(segments), max_size=len(segments))),
        row_dtypes=draw(st.permutations(ROW_DTYPES)),
        weights=draw(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4)),
        shuffle_pages=draw(st.booleans()),
        D=draw(WIDTHS),
        O=draw(WIDTHS),
        num_rows=num_rows,
        seed=draw(SEEDS),
    )


@fuzz
@given(batch=lora_batches())
def test_shrink_and_expand(isa, batch):
    (h, y), (exact_h, exact_y) = run(batch, "native"), run(batch.double(), "reference")
    assert_close(h, exact_h, torch.float32, num_terms(batch))
    # A row may stand in segments many times over, each time with as many terms more.
    most = int(torch.bincount(batch.segments.rows).max()) if len(batch.segments.rows) else 1
    assert_close(y, exact_y, torch.float32, most * num_terms(batch), spread=batch.spread())


@fuzz
@given(data=st.data())
def test_attention(isa, data):
    contexts = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    kv_heads = data.draw(st.integers(1, 3))
    batch = make_attention_batch(
        [(context, data.draw(st.integers(0, context))) for context in contexts],
        H=kv_heads * data.draw(st.integers(1, 6)),
        KVH=kv_heads,
        HD=data.draw(st.integers(1, 130)),
        page_tokens=data.draw(st.integers(1, 40)),
        kv_dtype=data.draw(st.sampled_from(FLOAT_ROW_DTYPES)),
        seed=data.draw(SEEDS),
    )
    got = paged_attention(
        batch.q, batch.pages, batch.layout, batch.layer, batch.sequences, scale=0.3, backend="native"
    )
    want = paged_attention(
        batch.q.double(), batch.pages, batch.layout, batch.layer, batch.sequences, scale=0.3, backend="reference"
    )  # fmt: skip
    assert_close(got, want, torch.float32, terms=batch.layout.head_dim + 32)


@fuzz
@given(data=st.data())
def test_writing_keys_and_values_gives_the_same_bytes(isa, data):
    batch = make_attention_batch(
        [(data.draw(st.integers(1, 60)), 1)],
        H=2,
        HD=data.draw(st.integers(1, 130)),
        page_tokens=data.draw(st.integers(1, 9)),
        kv_dtype=data.draw(st.sampled_from(FLOAT_ROW_DTYPES)),
    )
    num_slots = len(batch.pages) * batch.layout.page_tokens
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    slots = torch.randperm(num_slots, generator=generator)[: data.draw(st.integers(0, num_slots))]
    page, index = slots // batch.layout.page_tokens, slots % batch.layout.page_tokens
    k, v = torch.randn(2, len(slots), 2, batch.layout.head_dim, generator=generator)
    written = []
    for backend in ("native", "reference"):
        pages = batch.pages.clone()
        write_kv(k, v, pages, batch.layout, 0, page, index, backend=backend)  # nothing is there yet
        written.append(pages)
    assert torch.equal(written[0], batch.pages) == (len(slots) == 0)
    assert torch.equal(*written)


@fuzz
@given(T=st.integers(1, 60), D=WIDTHS, heads=st.integers(1, 4), with_delta=st.booleans(), seed=SEEDS)
def test_what_is_computed_row_by_row(isa, T, D, heads, with_delta, seed):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, delta, weight = randn(T, D), randn(T, D) if with_delta else None, randn(D)
    added, exact = x.clone(), x.double()
    got = ops.add_rms_norm(added, delta, weight, 0.01, backend="native")
    want = rowwise.add_rms_norm(exact, None if delta is None else delta.double(), weight.double(), 0.01)
    assert_close(added, exact, torch.float32, 1)
    assert_close(got, want, torch.float32, D)

    gate_up = randn(T, 2 * D)
    assert_close(
        ops.silu_mul(gate_up, backend="native"), rowwise.silu_mul(gate_up.double()), torch.float32, 4
    )

    rotated, cos, sin = randn(T, heads, 2 * D), randn(T, D), randn(T, D)
    exact = rotated.double()
    ops.rotate(rotated, cos, sin, backend="native")
    rowwise.rotate(exact, cos.double(), sin.double())
    assert_close(rotated, exact, torch.float32, 2)


@fuzz
@given(T=st.integers(1, 30), D=WIDTHS, O=WIDTHS, seed=SEEDS)
def test_products_of_integers_are_exact_on_integers(isa, T, D, O, seed):  # noqa: E741  the letters of the legend
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (T, D), generator=generator).float()
    w = torch.randint(-127, 128, (O, D), generator=generator).float()
    x[:, ::32] = w[:, ::32] = 127  # so that every scale is 1
    assert torch.equal(Int8Weight.from_float(w).product(x), (x.double() @ w.double().T).float())


@pytest.mark.parametrize("kernel", ["shrink", "expand"])
def test_the_batches_are_not_all_empty(kernel):
    """The fuzz would pass on nothing: batches that change h and y are among those it draws."""

    def has_effect(batch: LoraBatch) -> bool:
        result = run(batch.double(), "reference")[kernel == "expand"]
        return result.numel() > 0 and result.abs().max().item() > 1

    find(lora_batches(), has_effect)  # raises NoSuchExample where none is
