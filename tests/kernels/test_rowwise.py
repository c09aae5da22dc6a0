"""What is computed for each row by itself, of every backend, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from manylora.kernels import available_backends, ops
from tests.kernels.cases import assert_close

CASES = [(name, dtype) for name, backend in ops.BACKENDS.items() for dtype in backend.dtypes]
WIDTHS = [1, 15, 16, 37, 64, 576]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(backend, dtype, width):
    x, delta = randn(21, width, dtype=dtype), randn(21, width, dtype=dtype, seed=1)
    weight = randn(width, dtype=dtype, seed=2)
    want = F.rms_norm((x + delta).double(), (width,), weight.double(), 0.01)
    alone = F.rms_norm(x.double(), (width,), weight.double(), 0.01)
    assert (want - alone).abs().max() > 0.1

    assert_close(ops.add_rms_norm(x, None, weight, 0.01, backend=backend), alone, dtype, width)
    total = x + delta
    got = ops.add_rms_norm(x, delta, weight, 0.01, backend=backend)

    assert_close(got, want, dtype, width)
    assert torch.equal(x, total), "the sum must be left in x"


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(backend, dtype, width):
    # Wide enough for e^-x to leave the range of float.
    gate_up = randn(21, 2 * width, dtype=dtype) * 50
    gate, up = gate_up.double().chunk(2, dim=-1)
    want = F.silu(gate) * up
    assert want.abs().max() > 1
    assert_close(ops.silu_mul(gate_up, backend=backend), want, dtype, terms=1)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 10, 16, 64, 128])
def test_rotate_turns_pairs_of_channels_and_nothing_beside_them(backend, dtype, head_dim):
    T, H, half = 19, 3, head_dim // 2
    angle = torch.rand(T, half, generator=torch.Generator().manual_seed(0)) * 6
    heads = randn(T, H + 2, head_dim, dtype=dtype)
    before = heads.clone()
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    ops.rotate(heads[:, :H], cos, sin, backend=backend)

    a, b = before[:, :H].double().chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    want = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    assert (want - before[:, :H].double()).abs().max() > 0.1
    assert_close(heads[:, :H], want, dtype, terms=2)
    assert torch.equal(heads[:, H:], before[:, H:])


@pytest.mark.parametrize("backend", list(ops.BACKENDS))
def test_not_a_number_stays_in_its_row(backend):
    x = randn(4, 33, dtype=torch.float32)
    x[2, 32] = torch.nan
    normed = ops.add_rms_norm(x.clone(), None, torch.ones(33), 1e-5, backend=backend)
    gated = ops.silu_mul(torch.cat([x, torch.ones(4, 33)], dim=1), backend=backend)
    for y in (normed, gated):
        assert y[2].isnan().any()
        assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("width", [1, 7, 33, 1024, 2050])
@pytest.mark.parametrize("backend", available_backends())
def test_argmax_is_the_first_of_the_largest(backend, width):
    x = torch.randint(-3, 4, (40, width), generator=torch.Generator().manual_seed(width)).float()
    x[7, width // 2], x[8, 0], x[9, -1] = torch.nan, torch.inf, -torch.inf
    x[10] = -torch.inf
    want = torch.stack([row.eq(row.max()).int().argmax() for row in x])
    want[[7, 8, 10]] = -1
    if width == 1:
        want[9] = -1
    places = ops.argmax(x, backend=backend)
    assert places.dtype == torch.int64
    assert places.tolist() == want.tolist()
    # Not every row, and some from the middle of something wider.
    assert ops.argmax(x.repeat(1, 2)[1::3, :width], backend=backend).tolist() == want[1::3].tolist()
