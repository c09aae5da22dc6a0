"""What the front door refuses, and that its words name the thing, what was expected and what came."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from manylora.errors import ConfigError, KernelUnavailable
from manylora.kernels import (
    KvLayout,
    PagedSequences,
    RankRows,
    Segments,
    StackRows,
    add_lora,
    available_backends,
    lora_expand,
    lora_shrink,
    ops,
    paged_attention,
    write_kv,
)
from manylora.kernels.backend import Shrink
from tests.kernels.cases import make_attention_batch, make_lora_batch


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def shrink(**changes):
    batch = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 3])
    arguments = {"x": batch.x, "pages": batch.pages, "a": batch.a, "segments": batch.segments, **changes}
    return lora_shrink(**arguments)


def expand(**changes):
    batch = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 3])
    names = ("y", "pages", "b", "segments", "h_begin", "h_stride", "scaling")
    arguments = {"h": torch.zeros(11), **{name: getattr(batch, name) for name in names}, **changes}
    lora_expand(**arguments)


def at_once(**changes):
    batch = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 3])
    arguments = {name: getattr(batch, name) for name in ("y", "x", "pages", "stack", "segments")}
    add_lora(**(arguments | changes))


def site(**changes):
    """The stack of `at_once` with another site."""
    batch = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 3])
    return StackRows.of(batch.a, [replace(batch.stack.sites[0], **changes)])


def attention(lengths=((5, 1), (3, 2)), **changes):
    batch = make_attention_batch(lengths)
    names = ("q", "pages", "layout", "layer", "sequences")
    arguments = {name: getattr(batch, name) for name in names} | {"scale": 1.0} | changes
    return paged_attention(**arguments)


def test_what_is_right_is_taken():
    assert shrink().shape == (11,)
    expand()
    at_once()
    assert attention().shape == (3, 6, 16)


def test_backends_are_named_with_the_preferred_first():
    assert available_backends() == ("native", "grouped", "reference")


def test_unknown_backend_names_the_known():
    with pytest.raises(KernelUnavailable, match=r"'cuda-magic'.*native, grouped, reference"):
        shrink(backend="cuda-magic")


def test_dtype_that_no_backend_computes_in():
    with pytest.raises(
        KernelUnavailable, match=r"torch.int8 on cpu; there are native, .*which take torch.float32"
    ):
        shrink(x=torch.zeros(3, 48, dtype=torch.int8))


def test_dtype_that_the_backend_asked_for_does_not_compute_in():
    with pytest.raises(
        KernelUnavailable, match=r"native takes torch.float32, .* on a CPU, got torch.float64 on cpu"
    ):
        shrink(x=torch.zeros(3, 48, dtype=torch.float64), backend="native")


def test_without_a_name_the_first_that_computes_in_the_dtype_is_taken(monkeypatch):
    taken: list[str] = []

    def shrink_of(name: str) -> Shrink:
        def note(x: torch.Tensor, pages: Any, a: Any, segments: Any) -> torch.Tensor:
            taken.append(name)
            return x

        return note

    for name, backend in ops.BACKENDS.items():
        monkeypatch.setitem(ops.BACKENDS, name, replace(backend, shrink=shrink_of(name)))
    for dtype in (torch.float32, torch.float64):
        shrink(x=torch.zeros(3, 48, dtype=dtype))
    assert taken == ["native", "grouped"]


@pytest.mark.parametrize("backend", available_backends())
class TestRefuses:
    def test_pages_that_are_not_bytes(self, backend):
        with pytest.raises(ConfigError, match=r"torch.uint8, got \[2, 8\] torch.float32"):
            shrink(pages=torch.zeros(2, 8), backend=backend)

    def test_x_with_fewer_rows_than_named(self, backend):
        with pytest.raises(ConfigError, match=r"x .* at least the 3 rows .* got \[2, 48\]"):
            shrink(x=torch.zeros(2, 48), backend=backend)

    def test_y_with_fewer_rows_than_named(self, backend):
        with pytest.raises(ConfigError, match=r"y .* at least the 3 rows .* got \[2, 40\]"):
            expand(y=torch.zeros(2, 40), backend=backend)

    def test_rank_rows_of_another_number_of_segments(self, backend):
        with pytest.raises(ConfigError, match="a has 1 values, but there are 2 segments"):
            shrink(a=RankRows(torch.zeros(4, dtype=torch.int64), int32(0), int32(4)), backend=backend)

    def test_rank_row_beyond_the_pool(self, backend):
        batch = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 3])
        offset = batch.a.offset.clone()
        offset[5] = batch.pages.numel() - 8
        with pytest.raises(
            ConfigError,
            match=rf"segment 1 lies at byte {offset[5]} and takes 192 bytes.*{len(batch.pages)}",
        ):
            shrink(a=RankRows(offset, batch.a.begin, batch.a.end), backend=backend)

    def test_rank_rows_beyond_their_table(self, backend):
        with pytest.raises(ConfigError, match=r"segment 1: begin 2 and end 9 .* <= 4"):
            shrink(a=RankRows(torch.zeros(4, dtype=torch.int64), int32(0, 2), int32(2, 9)), backend=backend)

    def test_h_in_another_precision(self, backend):
        y, h = torch.zeros(3, 40, dtype=torch.bfloat16), torch.zeros(11, dtype=torch.bfloat16)
        with pytest.raises(
            ConfigError, match=r"torch.float32 for a y of torch.bfloat16, got \[11\] torch.bfloat16"
        ):
            expand(y=y, h=h, backend=backend)

    def test_scaling_of_another_dtype_or_length(self, backend):
        with pytest.raises(
            ConfigError,
            match=r"scaling must be contiguous torch.float32, got strides \(1,\) of torch.float64",
        ):
            expand(scaling=torch.ones(2, dtype=torch.float64), backend=backend)
        with pytest.raises(ConfigError, match="scaling has 3 values, but there are 2 segments"):
            expand(scaling=torch.ones(3), backend=backend)

    def test_pages_of_another_layout(self, backend):
        with pytest.raises(ConfigError, match=r"contiguous \[num_pages, 3072\] torch.uint8"):
            attention(pages=torch.zeros(4, 3071, dtype=torch.uint8), backend=backend)

    def test_layer_that_the_layout_has_not(self, backend):
        with pytest.raises(ConfigError, match=r"layer must be in 0..2, got 3"):
            attention(layer=3, backend=backend)

    def test_heads_that_do_not_share_evenly(self, backend):
        with pytest.raises(ConfigError, match=r"H a multiple of 2, got \[3, 5, 16\]"):
            attention(q=torch.zeros(3, 5, 16), backend=backend)

    def test_rows_that_are_not_the_new_tokens(self, backend):
        with pytest.raises(ConfigError, match="q has 4 rows, but the sequences have 3 new tokens"):
            attention(q=torch.zeros(4, 6, 16), backend=backend)

    @pytest.mark.parametrize("table", [[[0, -1], [1, -1]], [[0, 99], [1, -1]]])
    def test_sequence_without_pages_for_its_tokens(self, table, backend):
        sequences = PagedSequences(torch.tensor(table, dtype=torch.int32), int32(0, 1, 3), int32(5, 3))
        with pytest.raises(ConfigError, match="sequence 0 of 5 tokens needs 2 pages of 4 tokens"):
            attention(sequences=sequences, backend=backend)

    def test_context_shorter_than_its_new_tokens(self, backend):
        sequences = PagedSequences(torch.tensor([[0], [1]], dtype=torch.int32), int32(0, 1, 3), int32(1, 1))
        with pytest.raises(ConfigError, match="sequence 1 has 2 new tokens but context_len 1"):
            attention(sequences=sequences, backend=backend)


def test_segments_check_what_they_are_made_of():
    right = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 3]).segments
    with pytest.raises(
        ConfigError, match=r"Segments.rows must be \[\*\] torch.int32, contiguous, got \[3\] torch.int64"
    ):
        replace(right, rows=right.rows.long())
    with pytest.raises(
        ConfigError, match=r"Segments.weight must be \[3\] torch.float32, contiguous, got \[2\]"
    ):
        replace(right, weight=torch.ones(2))
    with pytest.raises(
        ConfigError, match=r"must rise from 0 to the number of entries \(3\), got \[0, 4, 3\]"
    ):
        shrink(segments=Segments(right.rows, int32(0, 4, 3), right.weight, right.row_dtype))
    with pytest.raises(ConfigError, match="so less than 4; got 7"):
        shrink(segments=Segments(right.rows, right.row_start, right.weight, right.row_dtype + 7))
    with pytest.raises(ConfigError, match="must not be negative, got -1"):
        shrink(segments=Segments(right.rows - 1, right.row_start, right.weight, right.row_dtype))


def test_write_kv_refuses_what_does_not_fit():
    layout = KvLayout(num_layers=1, page_tokens=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    pages = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    slots = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"must be \[3, 2, 8\] \(one slot per token\), got \[3, 1, 8\]"):
        write_kv(torch.zeros(3, 1, 8), torch.zeros(3, 2, 8), pages, layout, 0, slots, slots)


# -- both at once


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (lambda: site(columns=(0, 41)), r"columns 0:41 of a y with 40"),
        (lambda: site(columns=(-1, 39)), r"columns -1:39 of a y with 40"),
        (
            lambda: site(h_column=int32(1, 0)),
            r"columns 1 to 5 of h in segment 0, but the stack has 4 rank rows",
        ),
        (lambda: site(h_column=int32(0, -1)), r"columns -1 to 2 of h in segment 1"),
    ],
)
def test_a_site_beside_its_stack_is_refused(stack, message, backend):
    with pytest.raises(ConfigError, match=message):
        at_once(stack=stack(), backend=backend)


def test_a_site_in_another_table_is_refused():
    stack = make_lora_batch(segments=[[0]], ranks=[4]).stack
    b = stack.sites[0].b
    with pytest.raises(ConfigError, match="must be in the table of the stack"):
        StackRows.of(stack.a, [replace(stack.sites[0], b=RankRows(b.offset.clone(), b.begin, b.end))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_end": torch.zeros(1, 3, dtype=torch.int32)}, r"b_end must be \[1, 2\] .*got \[1, 3\]"),
        ({"h_column": torch.zeros(1, 2, dtype=torch.int64)}, r"h_column must be .*int32.*got .*int64"),
        ({"scaling": torch.ones(2, 2)[:, :1].T}, r"scaling must be \[1, 2\] torch.float32, contiguous"),
        ({"columns": ((0, 20), (20, 40))}, r"b_begin must be \[2, 2\]"),
    ],
)
def test_tables_of_a_stack_that_do_not_fit_are_refused(changes, message):
    stack = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 3]).stack
    with pytest.raises(ConfigError, match=message):
        replace(stack, **changes)


@pytest.mark.parametrize("backend", available_backends())
def test_segments_that_begin_anywhere_are_refused_at_once_too(backend):
    batch = make_lora_batch(segments=[[0, 1], [2]], ranks=[4, 3])
    with pytest.raises(ConfigError, match="row_start must rise"):
        at_once(segments=replace(batch.segments, row_start=int32(0, 4, 3)), backend=backend)


def test_activations_of_double_precision_are_not_mixed_with_others():
    with pytest.raises(ConfigError, match=r"torch.float64 or neither, got torch.float64 and torch.float32"):
        at_once(x=torch.zeros(3, 48, dtype=torch.float64))
