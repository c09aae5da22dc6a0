import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import AdapterMismatchError, ConfigError, RequestError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.compose import compose
from manylora.lora.formats import load_peft, save_peft
from manylora.lora.merge import dare, drop, ties, trim

SIZES = {"layers.0.q": (12, 10), "layers.0.k": (12, 4), "layers.1.q": (9, 16), "conv": (18, 7)}
WEIGHTS = st.floats(-3, 3).filter(lambda weight: abs(weight) > 0.01)


def make_adapter(seed, ranks, scaling=1.0, dtype=torch.float32, name=""):
    generator = torch.Generator().manual_seed(seed)
    sites = {
        site: LoraPair(
            torch.randn(rank, SIZES[site][0], generator=generator).to(dtype),
            torch.randn(SIZES[site][1], rank, generator=generator).to(dtype),
            scaling,
            (3, 2) if site == "conv" else None,
        )
        for site, rank in ranks.items()
    }
    return Adapter(sites, name=name or f"seed{seed}")


@st.composite
def adapters(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """Sites and ranks that differ, plain and rank-stabilised scalings, each of its own content."""
    ranks = draw(st.dictionaries(st.sampled_from(list(SIZES)), st.integers(1, 5), min_size=1))
    alpha = draw(st.sampled_from([1.0, 4.0, 7.3]))
    scaling = alpha / draw(st.sampled_from([1.0, 4.0, math.sqrt(8), math.sqrt(3)]))  # a root: rsLoRA
    return make_adapter(draw(st.integers(0, 10_000)), ranks, scaling, draw(st.sampled_from(dtypes)))


MIXTURES: st.SearchStrategy[Any] = st.lists(st.tuples(adapters(), WEIGHTS), min_size=1, max_size=3).map(
    lambda pairs: tuple(zip(*pairs, strict=True))
)


def deltas(adapter):
    found = {site: pair.delta() for site, pair in adapter.sites.items()}
    for site, delta in found.items():
        assert delta.norm() > 1e-3, f"{adapter.label} does nothing at {site}: nothing would be shown"
    return found


def weighted_sum(parts, weights):
    total: dict[str, Any] = {}
    for adapter, weight in zip(parts, weights, strict=True):
        for site, delta in deltas(adapter).items():
            total[site] = total.get(site, 0.0) + weight * delta
    return total


def scale_of(parts, weights, site):
    """How large the summands are at a site."""
    return sum(
        abs(weight) * float(adapter.sites[site].delta().norm())
        for adapter, weight in zip(parts, weights, strict=True)
        if site in adapter.sites
    )


def assert_close_to(adapter, want, mixture, tolerance):
    """The distance at each site is small beside the weighted deltas, which may cancel in the sum."""
    parts, weights = mixture
    assert adapter.sites.keys() == want.keys()
    for site, delta in want.items():
        distance = float((adapter.sites[site].delta() - delta).norm())
        assert distance <= tolerance * scale_of(parts, weights, site), site


EVERY_METHOD: list[tuple[Any, dict[str, Any]]] = [
    ("exact", {}),
    ("svd", {"rank": 5}),
    ("ties", {"density": 1.0}),
    ("dare", {"density": 1.0}),
]


LOSSY_METHODS: list[tuple[Any, dict[str, Any]]] = [
    ("exact", {}),
    ("svd", {"rank": 3}),
    ("ties", {"density": 0.4}),
    ("dare", {"density": 0.5, "seed": 7}),
]


@pytest.mark.parametrize(("method", "options"), EVERY_METHOD)
@settings(deadline=None, max_examples=12)
@given(adapter=adapters())
def test_one_adapter_at_weight_one_gives_itself_back(method, options, adapter):
    composition = compose([adapter], [1.0], method, **options)
    assert_close_to(composition.adapter, deltas(adapter), ([adapter], [1.0]), 1e-6)
    assert composition.error < 1e-6
    assert all(composition.adapter.ranks[site] <= pair.rank for site, pair in adapter.sites.items())
    if method == "exact":
        assert composition.adapter.identity == adapter.identity
        assert composition.error == 0.0


@settings(deadline=None, max_examples=25)
@given(mixture=MIXTURES)
def test_exact_is_the_weighted_sum_of_deltas(mixture):
    composition = compose(*mixture)
    assert_close_to(composition.adapter, weighted_sum(*mixture), mixture, 1e-6)
    if len(mixture[0]) > 1:
        assert composition.adapter.ranks == {
            site: sum(adapter.sites[site].rank for adapter in mixture[0] if site in adapter.sites)
            for site in composition.adapter.sites
        }


@settings(deadline=None, max_examples=25)
@given(
    parts=st.lists(adapters(dtypes=[torch.bfloat16]), min_size=1, max_size=3),
    data=st.data(),
)
def test_exact_is_exact_and_keeps_the_dtype_where_weights_are_powers_of_two(parts, data):
    parts = [
        Adapter({site: LoraPair(p.lora_a, p.lora_b, 2.0, p.kernel_size) for site, p in a.sites.items()})
        for a in parts
    ]
    weights = [data.draw(st.sampled_from([1.0, -1.0, 0.5, -4.0])) for _ in parts]
    composition = compose(parts, weights)
    assert composition.adapter.dtype == torch.bfloat16
    assert composition.error == 0.0
    assert_close_to(composition.adapter, weighted_sum(parts, weights), (parts, weights), 1e-14)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("exact", {}),
        ("svd", {"rank": 3}),
        ("ties", {"density": 0.4}),
        ("dare", {"density": 0.5, "seed": 7}),
    ],
)
@settings(deadline=None, max_examples=8)
@given(mixture=MIXTURES, data=st.data())
def test_the_order_of_adapters_does_not_matter_to_the_last_bit(method, options, mixture, data):
    parts, weights = mixture
    order = data.draw(st.permutations(range(len(parts))))
    once = compose(parts, weights, method, **options)
    again = compose([parts[i] for i in order], [weights[i] for i in order], method, **options)
    assert once.adapter.identity == again.adapter.identity
    assert once.error_by_site == again.error_by_site


@settings(deadline=None, max_examples=12)
@given(mixture=MIXTURES, other=adapters(), weights=st.tuples(WEIGHTS, WEIGHTS))
def test_a_composition_composes(mixture, other, weights):
    inner = compose(*mixture).adapter
    outer = compose([inner, other], weights).adapter
    flat = [*mixture[0], other], [*(weights[0] * weight for weight in mixture[1]), weights[1]]
    assert_close_to(outer, weighted_sum(*flat), flat, 1e-6)


@settings(deadline=None, max_examples=8)
@given(mixture=MIXTURES)
def test_a_composition_is_saved_and_loaded_as_it_is(tmp_path_factory, mixture):
    adapter = compose([*mixture[0], make_adapter(-1, {"layers.0.q": 3})], [*mixture[1], 0.7]).adapter
    folder = tmp_path_factory.mktemp("composed") / "saved"
    save_peft(adapter, folder)
    assert load_peft(folder).identity == adapter.identity


def test_weight_zero_changes_nothing_and_nothing_but_zero_is_refused():
    alice, bob = make_adapter(1, {"layers.0.q": 3}), make_adapter(2, {"conv": 2})
    assert compose([alice, bob], [1.0, 0.0]).adapter.identity == alice.identity
    assert compose([alice], [0.5]).adapter.identity != alice.identity
    with pytest.raises(RequestError, match="no adapter has a weight other than 0"):
        compose([alice], [0.0])
    with pytest.raises(RequestError, match="nothing to compose"):
        compose([], [])
    with pytest.raises(RequestError, match="2 adapters need as many weights, got 1"):
        compose([alice, bob], [1.0])
    with pytest.raises(RequestError, match="adapter 'seed1' must be a finite number, got nan"):
        compose([alice], [math.nan])


def test_adapters_that_cancel_leave_nothing_and_say_so():
    alice = make_adapter(1, {"layers.0.q": 3}, scaling=0.7)
    for method, options in EVERY_METHOD:
        composition = compose([alice, alice], [0.3, -0.3], method, **options)
        assert composition.adapter.sites["layers.0.q"].delta().norm() < 1e-6
        assert composition.error == 0.0


def test_adapters_of_two_models_are_refused():
    alice = make_adapter(1, {"layers.0.q": 3}, name="alice")
    pair = LoraPair(torch.ones(2, 12), torch.ones(11, 2), 1.0)
    with pytest.raises(AdapterMismatchError, match=r"its site 'layers\.0\.q' has \(in, out, kernel\)"):
        compose([alice, Adapter({"layers.0.q": pair}, name="bob")], [1.0, 1.0])


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("cat", {}, "unknown method 'cat'"),
        ("exact", {"rank": 3}, "does not use rank"),
        ("exact", {"density": 0.5}, "does not use density"),
        ("svd", {}, "needs rank"),
        ("svd", {"rank": 3, "seed": 1}, "does not use seed"),
        ("svd", {"rank": 0}, "rank must be at least 1"),
        ("ties", {}, "needs density"),
        ("ties", {"density": 0.5, "seed": 1}, "does not use seed"),
        ("dare", {"rank": 3}, "needs density"),
        ("dare", {"density": 0.0}, "density must be above 0"),
        ("ties", {"density": 1.1}, "at most 1"),
        ("exact", {"dtype": torch.float64}, "dtype must be one of"),
    ],
)
def test_options_that_do_not_belong_are_refused(method, options, says):
    with pytest.raises(ConfigError, match=says):
        compose([make_adapter(1, {"conv": 2})], [1.0], method, **options)


def test_a_composition_is_named_after_its_parts_and_keeps_their_base_model():
    parts = [make_adapter(1, {"conv": 2}, name="alice"), make_adapter(2, {"conv": 2}, name="bob")]
    composed = compose(parts, [1.0, 0.5]).adapter
    assert sorted(composed.name.split("+")) == ["alice:1", "bob:0.5"]
    assert compose(parts, [1.0, 0.5], name="both").adapter.name == "both"
    assert composed.base_model is None
    based = [Adapter(part.sites, base_model="llama") for part in parts]
    assert compose(based, [1.0, 0.5]).adapter.base_model == "llama"


def test_weights_beyond_the_dtype_are_refused():
    with pytest.raises(RequestError, match="does not fit into torch"):
        compose([make_adapter(1, {"conv": 2})], [1e9], dtype=torch.float16)


# svd


@settings(deadline=None, max_examples=12)
@given(mixture=MIXTURES, rank=st.integers(1, 6))
def test_svd_is_the_best_approximation_and_reports_its_error(mixture, rank):
    parts, weights = mixture
    composition = compose(parts, weights, "svd", rank=rank)
    squares = [0.0, 0.0]
    for site, delta in weighted_sum(parts, weights).items():
        sigma = torch.linalg.svdvals(delta)
        best = float(sigma[rank:].norm())
        got = float((composition.adapter.sites[site].delta() - delta).norm())
        scale = scale_of(parts, weights, site)
        assert composition.adapter.sites[site].rank <= rank
        assert got <= best + 1e-6 * scale
        assert composition.error_by_site[site] * float(delta.norm()) == pytest.approx(got, abs=1e-9 * scale)
        squares[0] += got**2
        squares[1] += float(delta.norm()) ** 2
    assert composition.error == pytest.approx(math.sqrt(squares[0] / squares[1]), abs=1e-6)


def test_svd_loses_nothing_at_the_full_rank_and_something_below():
    parts = [make_adapter(seed, {"layers.0.q": 3}) for seed in (1, 2)]
    errors = [compose(parts, [1.0, 0.5], "svd", rank=rank).error for rank in range(1, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] > 0.01
    assert errors[5] < 1e-6  # 3 + 3
    assert compose(parts, [1.0, 0.5], "svd", rank=8).adapter.ranks == {"layers.0.q": 6}


def test_rounding_to_a_dtype_is_part_of_the_error():
    parts = [make_adapter(seed, {"layers.0.q": 3}) for seed in (1, 2)]
    wide, narrow = (compose(parts, [1.0, 0.3], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.adapter.dtype == torch.bfloat16
    assert wide.error < 1e-7
    assert 1e-4 < narrow.error < 1e-2
    distance = narrow.adapter.sites["layers.0.q"].delta() - weighted_sum(parts, [1.0, 0.3])["layers.0.q"]
    norm = weighted_sum(parts, [1.0, 0.3])["layers.0.q"].norm()
    assert narrow.error_by_site["layers.0.q"] == pytest.approx(float(distance.norm() / norm), rel=1e-6)


# TIES and DARE


def test_trim_keeps_the_largest_entries():
    delta = torch.tensor([[1.0, -5.0, 0.5], [-2.0, 4.0, 3.0]])
    assert trim(delta, 0.5).tolist() == [[0, -5.0, 0], [0, 4.0, 3.0]]
    assert trim(delta, 0.4).tolist() == [[0, -5.0, 0], [0, 4.0, 3.0]]  # the ceiling of 2.4 entries
    assert trim(delta, 1.0).tolist() == delta.tolist()


def test_ties_elects_a_sign_and_averages_what_agrees():
    parts = [
        torch.tensor([[4.0, 1.0, -2.0, 3.0]]),
        torch.tensor([[2.0, -3.0, -4.0, -3.0]]),
        torch.tensor([[-1.0, 1.0, 0.0, 0.0]]),
    ]
    # Sums 5, -1, -6, 0: the last has no majority.
    assert ties([part.clone for part in parts], 1.0).tolist() == [[3.0, -3.0, -3.0, 0.0]]


def test_ties_trims_before_it_votes():
    parts = [torch.tensor([[10.0, 1.0]]), torch.tensor([[-2.0, 5.0]])]
    assert ties([part.clone for part in parts], 0.5).tolist() == [[10.0, 5.0]]
    assert ties([part.clone for part in parts], 1.0).tolist() == [[10.0, 3.0]]


def test_a_negative_weight_votes_for_what_it_adds():
    alice, bob = make_adapter(1, {"layers.0.q": 3}), make_adapter(2, {"layers.0.q": 3})
    opposite = Adapter({site: LoraPair(p.lora_a, -p.lora_b, p.scaling) for site, p in bob.sites.items()})
    subtracted = (
        compose([alice, bob], [1.0, -0.5], "ties", density=0.5, rank=10).adapter.sites["layers.0.q"].delta()
    )
    added = (
        compose([alice, opposite], [1.0, 0.5], "ties", density=0.5, rank=10)
        .adapter.sites["layers.0.q"]
        .delta()
    )
    torch.testing.assert_close(subtracted, added, rtol=0, atol=1e-5)


def test_drop_keeps_its_share_and_scales_it_up():
    delta = torch.ones(300, 300, dtype=torch.float64)
    dropped = drop(delta, 0.25, "key")
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert float((dropped != 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dropped, drop(delta, 0.25, "key"))
    assert not torch.equal(dropped, drop(delta, 0.25, "other key"))


def test_the_mean_of_dare_over_seeds_is_the_sum():
    generator = torch.Generator().manual_seed(0)
    parts = {name: torch.randn(6, 5, generator=generator, dtype=torch.float64) for name in ("a", "b")}
    made = {name: part.clone for name, part in parts.items()}
    total = sum(parts.values())
    runs = torch.stack([dare(made, 0.5, seed) for seed in range(2000)])
    assert (runs[0] - total).abs().max() > 0.1
    # An entry of size d has variance d^2 at density 1/2; the mean of 2000 has its 45th part as deviation.
    deviation = (parts["a"] ** 2 + parts["b"] ** 2).sqrt() / math.sqrt(2000)
    assert ((runs.mean(dim=0) - total).abs() < 5 * deviation).all()


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_the_reported_error_is_that_of_the_smaller_rank(method):
    parts = [make_adapter(seed, {"layers.0.q": 2, "conv": 2}) for seed in (1, 2)]
    weights = [1.0, 0.8]
    full = compose(parts, weights, method, density=0.5, rank=16)
    assert full.error < 1e-6, "at the full rank the merged delta itself"
    small = compose(parts, weights, method, density=0.5)
    assert small.adapter.ranks == {"layers.0.q": 4, "conv": 4}
    for site, pair in small.adapter.sites.items():
        merged = full.adapter.sites[site].delta()
        got = float((pair.delta() - merged).norm() / merged.norm())
        assert small.error_by_site[site] == pytest.approx(got, abs=1e-5)
        best = float(torch.linalg.svdvals(merged)[4:].norm() / merged.norm())
        assert best > 0.05
        assert got == pytest.approx(best, rel=1e-3)


def test_dare_is_random_by_seed_only():
    parts = [make_adapter(seed, {"layers.0.q": 2}) for seed in (1, 2)]

    def composed(seed):
        return compose(parts, [1.0, 0.8], "dare", density=0.5, seed=seed).adapter.identity

    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert composed(1) == composed(1)
    assert composed(None) == composed(0) != composed(1)
    assert torch.equal(torch.get_rng_state(), before), "composing must not touch the caller's random state"
