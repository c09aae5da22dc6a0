"""What pages waste, bounded; and that the layouts they are compared with are counted rightly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import CapacityError
from manylora.memory import ModelShape, choose_page_tokens, place_rank_rows
from manylora.memory.page_size import MAX_WASTE, MIN_RANK, adapter_waste, kv_waste, rank_runs
from manylora.memory.waste import MODELS, main, num_planes_first_fit

CHOSEN = {
    "SmolLM2-135M, KV float32": 8,
    "SmolLM2-135M, KV bfloat16": 16,
    "Llama-3-8B, KV bfloat16": 16,
    "Qwen2.5-7B, KV bfloat16": 16,
}
TINY = ModelShape(
    name="tiny",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    kv_itemsize=4,
)


def test_the_page_of_each_model():
    assert {shape.name: choose_page_tokens(shape) for shape in MODELS} == CHOSEN


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_adapters_on_all_linears_waste_little_at_any_rank(shape):
    page_bytes = shape.page_bytes(CHOSEN[shape.name])
    for rank in range(MIN_RANK, 129):
        waste = adapter_waste(rank_runs(shape, [rank] * shape.num_layers), page_bytes)
        assert 0 <= waste <= MAX_WASTE, f"rank {rank}"
    assert kv_waste(CHOSEN[shape.name]) <= MAX_WASTE


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_any_adapter_loses_less_than_a_page_and_two_rows_a_page(shape):
    page_bytes = shape.page_bytes(CHOSEN[shape.name])
    for ranks in ([4] * 4, [1], [16] * 4, [1 + layer % 7 for layer in range(shape.num_layers)]):
        runs = rank_runs(shape, ranks)
        num_pages = place_rank_rows(runs, page_bytes).num_pages
        used = sum(number * size for number, size in runs)
        assert (num_pages - 1) * (page_bytes - max(size for _, size in runs)) <= used


def test_an_adapter_holds_the_parameters_of_its_sites():
    (shape,) = (shape for shape in MODELS if shape.name.startswith("Llama"))
    q, kv, mlp = 4096 + 4096, 4096 + 1024, 4096 + 14336  # in + out of each site
    per_rank = 2 * q + 2 * kv + 3 * mlp
    assert sum(number * size for number, size in rank_runs(shape, [16])) == 16 * per_rank * 2
    attention = rank_runs(shape, [16], mlp=False)
    assert sum(number * size for number, size in attention) == 16 * (2 * q + 2 * kv) * 2


def test_larger_pages_are_not_chosen_where_they_waste_too_much():
    (smol,) = (shape for shape in MODELS if shape.name == "SmolLM2-135M, KV float32")
    runs = rank_runs(smol, [MIN_RANK] * smol.num_layers)
    assert adapter_waste(runs, smol.page_bytes(16)) > MAX_WASTE
    assert choose_page_tokens(smol, candidates=(16, 64)) == 16  # none keeps to the bound: the least bad
    assert kv_waste(32) > MAX_WASTE > kv_waste(16)


def test_a_model_whose_rows_fit_only_large_pages():
    small_kv = ModelShape(
        name="",
        num_layers=1,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=600,
        kv_itemsize=2,
    )
    assert small_kv.page_bytes(16) < 600 * 2 <= small_kv.page_bytes(32)
    assert choose_page_tokens(small_kv, candidates=(4, 8, 16, 32)) == 32
    with pytest.raises(CapacityError, match="a rank row of 1200 bytes"):
        choose_page_tokens(small_kv, candidates=(4, 16))


def test_tiny_models_get_pages_too():
    assert choose_page_tokens(TINY) in (4, 8, 16, 32, 64)
    assert choose_page_tokens(TINY, itemsize=4) in (4, 8, 16, 32, 64)


@settings(deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=6),
    plane_bytes=st.integers(20, 60),
)
def test_planes_are_those_of_first_fit_row_by_row(runs, plane_bytes):
    rows = sorted((size for number, size in runs for _ in range(number)), reverse=True)
    expected: int | None = None
    if rows[0] <= plane_bytes:
        free: list[int] = []
        for row in rows:
            fitting = next((plane for plane, room in enumerate(free) if room >= row), None)
            if fitting is None:
                free.append(plane_bytes - row)
            else:
                free[fitting] -= row
        expected = len(free)
    assert num_planes_first_fit(runs, plane_bytes) == expected


def test_the_command_prints_a_table_for_each_model(capsys):
    assert main() == 0
    out = capsys.readouterr().out
    assert all(f"{name}: {page_tokens} tokens" in out for name, page_tokens in CHOSEN.items())


def test_the_command_fails_where_the_bound_is_broken(capsys, monkeypatch):
    monkeypatch.setattr("manylora.memory.waste.MAX_WASTE", 0.025)
    assert main() == 1
    assert "more than 2 % wasted: SmolLM2" in capsys.readouterr().out
