"""Figures from factors equal those of the dense deltas, and obey their laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from manylora.errors import AdapterMismatchError, RequestError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.diagnose import BaseNorm, diagnose_weights, excess_overlap
from manylora.lora.low_rank_svd import expected_overlap, inner_product, svd_of

FEW = settings(deadline=None, max_examples=25)

Sizes = dict[str, tuple[int, int, int]]
"""Site to (in, out, rank)."""


def adapter(sizes: Sizes, seed: int, name: str, scaling: float = 0.7) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        site: LoraPair(
            torch.randn(rank, d, generator=generator), torch.randn(o, rank, generator=generator), scaling
        )
        for site, (d, o, rank) in sizes.items()
    }
    return Adapter(pairs, name=name)


def dense_space(delta: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the column space."""
    u: Tensor = torch.linalg.svd(delta).U[:, :rank]
    return u


@FEW
@given(
    seed=st.integers(0, 999),
    ranks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    weights=st.tuples(st.integers(-20, 20).map(lambda n: n / 10), st.integers(1, 20).map(lambda n: n / 10)),
)
def test_site_figures_equal_those_of_the_dense_sum(seed, ranks, weights):
    first = adapter({"s": (17, 12, ranks[0]), "only": (5, 6, 2)}, seed, "first")
    second = adapter({"s": (17, 12, ranks[1])}, seed + 1000, "second", scaling=-0.3)
    base = {"s": BaseNorm(10.0, 4.0), "only": BaseNorm(3.0, 2.0), "untouched": BaseNorm(7.0, 5.0)}
    found = diagnose_weights([first, second], weights, base)
    sums = {
        "s": weights[0] * first.sites["s"].delta() + weights[1] * second.sites["s"].delta(),
        "only": weights[0] * first.sites["only"].delta(),
    }
    for site in found.sites:
        sigma = torch.linalg.svdvals(sums[site.site])
        assert math.isclose(site.frobenius, float(sigma.norm()), rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(site.spectral, float(sigma[0]), rel_tol=1e-9, abs_tol=1e-12)
        share = sigma[sigma > 1e-12 * max(1.0, float(sigma[0]))] / sigma.sum()
        entropy = -float((share * share.log()).sum())
        assert math.isclose(site.effective_rank, math.exp(entropy) if len(share) else 0.0, rel_tol=1e-6)
        assert site.base is not None
        assert site.relative == pytest.approx(site.frobenius / site.base.frobenius)
        assert site.relative_spectral == pytest.approx(site.spectral / site.base.spectral)
    whole = math.hypot(*(float(delta.norm()) for delta in sums.values()))
    assert found.frobenius == pytest.approx(whole)
    assert found.relative == pytest.approx(whole / math.hypot(10.0, 3.0, 7.0))
    relatives = [site.relative for site in found.sites if site.relative is not None]
    assert relatives == sorted(relatives, reverse=True)
    assert found.max_relative == relatives[0]


@FEW
@given(seed=st.integers(0, 999), ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_pair_figures_equal_those_of_the_dense_deltas(seed, ranks):
    first = adapter({"s": (17, 12, ranks[0]), "t": (9, 9, 2), "only": (5, 6, 2)}, seed, "first")
    second = adapter({"s": (17, 12, ranks[1]), "t": (9, 9, 3)}, seed + 1000, "second", scaling=-0.3)
    [pair] = diagnose_weights([first, second], [1.0, 1.0]).pairs
    d = {site: (first.sites[site].delta(), second.sites[site].delta()) for site in ("s", "t")}
    inner = sum(float((a * b).sum()) for a, b in d.values())
    norms = [math.hypot(*(float(p.delta().norm()) for p in x.sites.values())) for x in (first, second)]
    assert pair.num_common_sites == 2
    assert pair.cosine == pytest.approx(inner / (norms[0] * norms[1]), abs=1e-12)
    site_cosines = [float((a * b).sum() / (a.norm() * b.norm())) for a, b in d.values()]
    assert pair.max_site_cosine == pytest.approx(max(site_cosines, key=abs), abs=1e-12)
    columns: list[float] = []
    rows: list[float] = []
    for site, (a, b) in d.items():
        p, q = first.sites[site].rank, second.sites[site].rank
        for into, left, right in ((columns, a, b), (rows, a.T, b.T)):
            cosines = torch.linalg.svdvals(dense_space(left, p).T @ dense_space(right, q))
            into.append(float(cosines.square().sum()) / min(p, q) - max(p, q) / len(left))
    assert pair.column_overlap == pytest.approx(sum(columns) / 2, abs=1e-9)
    assert pair.row_overlap == pytest.approx(sum(rows) / 2, abs=1e-9)


def test_inner_product_equals_the_trace_of_factors():
    generator = torch.Generator().manual_seed(3)
    (b1, a1), (b2, a2) = (
        (
            torch.randn(12, rank, generator=generator).double(),
            torch.randn(rank, 17, generator=generator).double(),
        )
        for rank in (3, 5)
    )
    trace = torch.trace((b1.T @ b2) @ (a2 @ a1.T))
    assert abs(float(trace)) > 1
    assert inner_product(svd_of(b1, a1), svd_of(b2, a2)) == pytest.approx(float(trace))


def test_an_adapter_and_itself():
    one = adapter({"s": (16, 20, 4)}, 0, "one")
    [pair] = diagnose_weights([one, one], [1.0, 0.5]).pairs
    assert pair.cosine == pytest.approx(1.0)
    assert pair.column_overlap == pytest.approx(1 - 4 / 20)
    assert pair.row_overlap == pytest.approx(1 - 4 / 16)


def test_opposite_weights_of_one_adapter_cancel():
    one = adapter({"s": (16, 20, 4)}, 0, "one")
    assert diagnose_weights([one], [1.0]).frobenius > 1
    [site] = diagnose_weights([one, one], [1.0, -1.0]).sites
    assert (site.frobenius, site.spectral, site.effective_rank) == (0.0, 0.0, 0.0)


def test_random_subspaces_overlap_as_expected():
    # 200 draws: the mean of the overlap is within 0.01 of its expectation, which is 0.25 here.
    generator = torch.Generator().manual_seed(0)
    bases = [
        [torch.linalg.qr(torch.randn(24, k, generator=generator).double()).Q for k in (3, 6)]
        for _ in range(200)
    ]
    assert expected_overlap(24, 3, 6) == 0.25
    assert abs(sum(excess_overlap(p, q) for p, q in bases) / 200) < 0.01


def test_disjoint_subspaces_overlap_less_than_random_ones():
    eye = torch.eye(8, dtype=torch.float64)
    assert excess_overlap(eye[:, :2], eye[:, 2:5]) == pytest.approx(-3 / 8)


def test_effective_rank_counts_equal_directions():
    eye = torch.eye(6, dtype=torch.float64)
    assert svd_of(eye[:, :3], eye[:3]).effective_rank == pytest.approx(3)
    assert svd_of(eye[:, :1], eye[:1]).effective_rank == pytest.approx(1)


def test_rank_deficient_factors_have_the_subspaces_of_their_product():
    # As PEFT initialises it: lora_b zero, so that the delta writes nowhere.
    fresh = Adapter({"s": LoraPair(torch.randn(4, 16), torch.zeros(20, 4), 1.0)}, name="fresh")
    other = adapter({"s": (16, 20, 4)}, 0, "other")
    [pair] = diagnose_weights([fresh, other], [1.0, 1.0]).pairs
    assert (pair.cosine, pair.column_overlap, pair.row_overlap) == (0.0, 0.0, 0.0)
    repeated = svd_of(torch.ones(5, 3, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64))
    assert repeated.rank == 1
    assert_close(repeated.u * repeated.sigma @ repeated.v.T, torch.full((5, 4), 3.0, dtype=torch.float64))


def test_without_a_base_nothing_is_relative():
    found = diagnose_weights([adapter({"s": (16, 20, 4)}, 0, "one")], [1.0])
    assert found.relative is found.max_relative is found.sites[0].relative is None
    assert found.sites[0].relative_spectral is None


def test_bad_input_is_refused_by_name():
    one, other = adapter({"s": (16, 20, 4)}, 0, "one"), adapter({"s": (16, 21, 4)}, 0, "other")
    with pytest.raises(
        AdapterMismatchError, match=r"site 's'.*\(16, 20\) in adapter 'one'.*\(16, 21\) in adapter 'other'"
    ):
        diagnose_weights([one, other], [1.0, 1.0])
    with pytest.raises(AdapterMismatchError, match=r"adapter 'one' has a site 's', which the base has not"):
        diagnose_weights([one], [1.0], {"t": BaseNorm(1.0, 1.0)})
    for adapters, weights in (([], []), ([one], [1.0, 2.0]), ([one], [math.nan])):
        with pytest.raises(RequestError, match="one finite weight for each adapter"):
            diagnose_weights(adapters, weights)
