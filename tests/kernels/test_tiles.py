"""The product in tiles: as exact as one of floats, a weight of eight bits all but exactly, each row by itself."""

import pytest
import torch
import torch.nn.functional as F

from manylora.errors import ConfigError, KernelUnavailable
from manylora.kernels.native import tiles
from manylora.kernels.native.int8 import LEVELS, Int8Weight
from manylora.kernels.native.tiles import STEP, TileWeight

SHAPES = [
    (1, 1, 1),
    (1, 576, 192),
    (3, 37, 45),
    (16, 64, 32),
    (17, 70, 33),
    (33, 130, 300),
    (128, 1536, 96),
]  # T, D, O
KINDS = ["float32", "float16", "bfloat16", "int8"]
has_tiles = pytest.mark.skipif(not tiles.is_available(), reason="this processor has no tiles")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laid_out(kind: str, *shape: int) -> TileWeight:
    """A weight that some dtype holds, or that is rounded to eight bits."""
    w = randn(*shape, seed=1)
    return (
        TileWeight.from_float(w, int8=True)
        if kind == "int8"
        else TileWeight.from_float(w.to(getattr(torch, kind)))
    )


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@has_tiles
@pytest.mark.parametrize(("T", "D", "O"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_is_as_exact_as_a_product_of_floats(T, D, O, with_bias):  # noqa: E741
    x, w = randn(T, D), randn(O, D, seed=1)
    bias = randn(O, seed=2) if with_bias else None
    want = F.linear(x.double(), w.double(), None if bias is None else bias.double())

    got = TileWeight.from_float(w, bias).product(x)

    floats, one_part = F.linear(x, w, bias), F.linear(x.bfloat16(), w.bfloat16()).float()
    assert rms(got - want) <= max(3 * rms(floats - want), 1e-7 * rms(want))
    assert rms(one_part - want) > 1e-3 * rms(want), "bfloat16 alone would do"


@has_tiles
@pytest.mark.parametrize("magnitude", [1e-20, 1e20])
def test_values_far_from_one_are_as_exact(magnitude):
    """bfloat16 has the exponents of float32."""
    x, w = magnitude * randn(20, 96), randn(40, 96, seed=1) / magnitude
    want = x.double() @ w.double().T
    assert rms(TileWeight.from_float(w).product(x) - want) < 1e-6 * rms(want)


@has_tiles
def test_every_bit_of_both_sides_counts():
    """Products with one: each value comes back, up to the rounding of a sum."""
    x, eye = randn(64, STEP), torch.eye(STEP)
    for got in (TileWeight.from_float(eye).product(x), TileWeight.from_float(x).product(eye).T):
        assert ((got - x).abs() <= 2**-23 * x.abs()).all()


@has_tiles
@pytest.mark.parametrize(("T", "D", "O"), SHAPES)
def test_a_weight_of_eight_bits_is_all_that_is_rounded(T, D, O):  # noqa: E741
    x, w, bias = randn(T, D), randn(O, D, seed=1), randn(O, seed=2)
    weight = TileWeight.from_float(w, bias, int8=True)
    dense = weight.dense()
    want = F.linear(x.double(), dense.double(), bias.double())

    got = weight.product(x)

    assert torch.equal(dense, Int8Weight.from_float(w).dense())
    if D > 1:
        assert (dense - w).abs().max() > 0, "rounding must have an effect"
    assert rms(got - want) < 1e-5 * rms(want)


@has_tiles
def test_a_weight_of_eight_bits_takes_a_byte():
    w = randn(64, 96)
    assert TileWeight.from_float(w, int8=True).packed.nbytes == w.numel()
    assert TileWeight.from_float(w).packed.nbytes == w.nbytes


@has_tiles
def test_is_exact_on_integers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-LEVELS, LEVELS + 1, (17, 203), generator=generator).float()
    w = torch.randint(-LEVELS, LEVELS + 1, (95, 203), generator=generator).float()
    w[:, 0] = LEVELS
    for int8 in (False, True):
        assert torch.equal(TileWeight.from_float(w, int8=int8).product(x), x @ w.T)


@has_tiles
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_do_not_depend_on_the_batch(kind):
    x, w = randn(71, 200), laid_out(kind, 130, 200)
    together = w.product(x)
    for num_rows in (1, 2, 15, 16, 17, 32, 33, 48, 64):
        assert torch.equal(w.product(x[:num_rows]), together[:num_rows])
        assert torch.equal(w.product(x[-num_rows:]), together[-num_rows:])


@has_tiles
@pytest.mark.parametrize("kind", KINDS)
def test_nor_on_the_threads(kind):
    x, w = randn(71, 200), laid_out(kind, 1000, 200)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(w.product(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@has_tiles
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row_and_shows(kind, bad):
    x, w = randn(40, 64), laid_out(kind, 40, 64)
    before = w.product(x)
    x[3, 36] = bad
    y = w.product(x)
    others = torch.arange(40) != 3
    assert not y[3].isfinite().any()
    assert torch.equal(y[others], before[others])


@has_tiles
@pytest.mark.parametrize("kind", KINDS[:3])
def test_dense_gives_back_the_weight(kind):
    assert torch.equal(
        laid_out(kind, 45, 70).dense(), randn(45, 70, seed=1).to(getattr(torch, kind)).float()
    )


@has_tiles
@pytest.mark.parametrize(
    ("kind", "parts", "bytes_each"), [("bfloat16", 1, 2), ("float16", 2, 4), ("float32", 0, 4)]
)
def test_a_weight_is_stored_in_as_few_parts_as_hold_it(kind, parts, bytes_each):
    weight = laid_out(kind, 64, 96)
    assert weight.parts == parts
    assert weight.packed.nbytes == 64 * 96 * bytes_each


@has_tiles
@pytest.mark.parametrize(("T", "D", "O"), SHAPES)
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fewer_parts_have_the_bits_of_three(T, D, O, kind, with_bias, monkeypatch):  # noqa: E741
    """What is left out was zero."""
    x, w = randn(T, D), randn(O, D, seed=1).to(getattr(torch, kind))
    bias = randn(O, seed=2) if with_bias else None
    got = TileWeight.from_float(w, bias).product(x)

    monkeypatch.setattr(tiles, "MAX_STORED_PARTS", 0)
    of_floats = TileWeight.from_float(w, bias)

    assert of_floats.parts == 0, "nothing to compare with"
    assert torch.equal(got, of_floats.product(x))


@has_tiles
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.0**-130 * 1.7])
def test_a_value_that_no_parts_hold_is_left_a_float(value):
    w = randn(40, 64).bfloat16().float()
    w[7, 11] = value
    weight = TileWeight.from_float(w)
    assert weight.parts == 0
    assert torch.equal(weight.dense().nan_to_num(), w.nan_to_num())


@has_tiles
def test_rows_may_lie_apart():
    x, w = randn(9, 100), TileWeight.from_float(randn(40, 64, seed=1))
    assert torch.equal(w.product(x[:, 20:84]), w.product(x[:, 20:84].contiguous()))
    assert torch.equal(w.product(x[:, :64].t().contiguous().t()), w.product(x[:, :64].contiguous()))


@has_tiles
def test_no_rows_give_no_rows():
    assert TileWeight.from_float(randn(40, 64)).product(torch.zeros(0, 64)).shape == (0, 40)


@has_tiles
def test_refuses_what_does_not_fit():
    w = TileWeight.from_float(randn(4, 8))
    with pytest.raises(ConfigError, match=r"x must be \[\*, 8\] on the CPU, got \[2, 7\]"):
        w.product(torch.zeros(2, 7))
    with pytest.raises(ConfigError, match=r"weight must be \[O, D\] on the CPU to be laid out, got \[8\]"):
        TileWeight.from_float(torch.zeros(8))


def test_says_where_there_are_no_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "is_available", lambda: False)
    with pytest.raises(KernelUnavailable, match="a processor with AMX"):
        TileWeight.from_float(randn(4, 8))
