"""The product on eight-bit integers: right within its rounding, exact where it can be, each row by itself."""

import pytest
import torch

from manylora.errors import ConfigError
from manylora.kernels.native.int8 import GROUP, LEVELS, Int8Weight

SHAPES = [(1, 1, 1), (1, 576, 192), (3, 37, 45), (12, 64, 32), (13, 70, 33), (29, 130, 300)]  # T, D, O


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(rows: torch.Tensor, group: int) -> torch.Tensor:
    """What integers with a scale per row and `group` columns stand for, in float64."""
    parts = rows.double().split(group, dim=1)
    scales = [part.abs().amax(dim=1, keepdim=True) / LEVELS for part in parts]
    return torch.cat([(p / s).round() * s for p, s in zip(parts, scales, strict=True)], dim=1)


@pytest.mark.parametrize(("T", "D", "O"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_is_the_product_of_what_both_were_rounded_to(isa, T, D, O, with_bias):  # noqa: E741
    x, w = randn(T, D), randn(O, D, seed=1)
    bias = randn(O, seed=2) if with_bias else None
    exact = x.double() @ w.double().T
    want = rounded(x, GROUP) @ rounded(w, D).T
    if D > 1:
        assert (want - exact).abs().max() > 0, "rounding must have an effect"
    if bias is not None:
        want = want + bias.double()

    got = Int8Weight.from_float(w, bias).product(x)

    # A value half way between two integers may go either way: a step of one of D products.
    step = x.abs().max() / LEVELS * w.abs().max()
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max() + step


def test_is_near_the_float_product():
    x, w = randn(64, 576), randn(192, 576, seed=1)
    exact = x @ w.T
    error = Int8Weight.from_float(w).product(x) - exact
    assert 0 < error.square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def test_is_exact_on_integers(isa):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (17, 203), generator=generator).float()
    w = torch.randint(-127, 128, (95, 203), generator=generator).float()
    x[:, ::GROUP] = w[:, ::GROUP] = 127
    assert torch.equal(Int8Weight.from_float(w).product(x), x @ w.T)


def test_the_largest_sums_do_not_overflow(isa):
    x, w = torch.full((2, 16384), 3.0), torch.full((33, 16384), -5.0)
    got = Int8Weight.from_float(w).product(x)
    torch.testing.assert_close(got, torch.full((2, 33), -15.0 * 16384))


WIDTHS = pytest.mark.parametrize("D", [90, 96])  # whole groups, and not


@WIDTHS
def test_an_outlier_row_changes_nobody_else(isa, D):
    x, w = randn(40, D), Int8Weight.from_float(randn(70, D, seed=1))
    before = w.product(x)
    x[7] *= 1e6
    after = w.product(x)
    others = torch.arange(40) != 7
    assert (after[7] - before[7]).abs().max() > 1e3
    assert torch.equal(after[others], before[others])


def test_an_outlier_input_leaves_other_groups_as_fine_as_they_were(isa):
    x, w = randn(7, 3 * GROUP), randn(40, 3 * GROUP, seed=1)
    x[:, 2 * GROUP :] = 0
    w[:, 2 * GROUP] = 0  # so that the outlier itself adds nothing
    weight = Int8Weight.from_float(w)
    before, exact = weight.product(x), x @ weight.dense().T
    x[:, 2 * GROUP] = 1e4
    common_scale = rounded(x, 3 * GROUP) @ weight.dense().double().T
    assert (common_scale - exact).abs().max() > 20 * (before - exact).abs().max() > 0
    assert torch.equal(weight.product(x), before)


@WIDTHS
def test_bits_of_a_row_do_not_depend_on_the_batch(isa, D):
    x, w = randn(31, D), Int8Weight.from_float(randn(65, D, seed=1))
    together = w.product(x)
    for row in (0, 5, 6, 29, 30):
        assert torch.equal(w.product(x[row : row + 1])[0], together[row])


def test_zero_rows_and_zero_outputs_give_zero(isa):
    x, w = randn(5, 40), randn(40, 40, seed=1)
    x[2] = 0
    w[3] = 0
    y = Int8Weight.from_float(w).product(x)
    assert (y[2] == 0).all()
    assert (y[:, 3] == 0).all()
    assert (y[0] != 0).any()


@pytest.mark.parametrize("D", [37, 64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row_and_shows(isa, bad, D):
    x, w = randn(10, D), Int8Weight.from_float(randn(40, D, seed=1))
    x[3, 36] = bad
    y = w.product(x)
    others = torch.arange(10) != 3
    assert not y[3].isfinite().any()
    assert y[others].isfinite().all()


def test_dense_gives_back_what_the_integers_stand_for():
    w = randn(45, 70)
    w[5] = 0
    dense = Int8Weight.from_float(w).dense()
    assert 0 < (dense - w).abs().max() <= (w.abs().amax(dim=1, keepdim=True) / LEVELS / 2 + 1e-6).max()
    assert torch.equal(Int8Weight.from_float(dense).packed, Int8Weight.from_float(w).packed)


def test_refuses_what_does_not_fit():
    w = Int8Weight.from_float(randn(4, 8))
    with pytest.raises(ConfigError, match=r"x must be \[\*, 8\] on the CPU, got \[2, 7\]"):
        w.product(torch.zeros(2, 7))
    with pytest.raises(ConfigError, match=r"weight must be \[O, D\] on the CPU to be rounded, got \[8\]"):
        Int8Weight.from_float(torch.zeros(8))
