"""What the factors of some weighted adapters say about their sum: how large it is, and how they meet in it.

Knows no model: of the base it takes norms, and what the sum does to the model's answers it cannot say.
"""

# Shapes: O out-features, D in-features, R rank. Computed in float64; no delta [O, D] is ever formed.

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from manylora.errors import AdapterMismatchError, RequestError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.low_rank_svd import LowRankSvd, expected_overlap, inner_product, overlap, svd_of


@dataclass(frozen=True, slots=True)
class BaseNorm:
    """The size of a base weight."""

    frobenius: float
    spectral: float
    """The largest singular value."""


@dataclass(frozen=True, slots=True)
class SiteDelta:
    """The weighted sum of all deltas at one site."""

    site: str
    num_adapters: int
    """Adapters of the mixture that have this site."""

    frobenius: float
    spectral: float

    effective_rank: float
    """exp of the entropy of the singular values, normalised to sum 1; 0 for a sum of zero."""

    base: BaseNorm | None
    """None where no base was given."""

    @property
    def relative(self) -> float | None:
        """The Frobenius norm over the base weight's."""
        return None if self.base is None else ratio(self.frobenius, self.base.frobenius)

    @property
    def relative_spectral(self) -> float | None:
        return None if self.base is None else ratio(self.spectral, self.base.spectral)


@dataclass(frozen=True, slots=True)
class PairOverlap:
    """How the deltas of two adapters, at weight 1, lie to each other. Weights of unlike signs turn the cosine over."""

    first: str
    second: str
    num_common_sites: int

    cosine: float
    """Of both deltas over all sites, as one long vector each: a site that one of them leaves alone counts as zero."""

    max_site_cosine: float
    """The one of largest magnitude among single sites."""

    column_overlap: float
    """Mean over common sites of what `excess_overlap` gives for the column spaces: what both write to."""

    row_overlap: float
    """The same for the row spaces: what both read."""


@dataclass(frozen=True)
class WeightDiagnosis:
    """What is known of a mixture from its factors, and from norms of the base where they were given."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    sites: tuple[SiteDelta, ...]
    """Of every site that some adapter has; the relatively largest first."""

    pairs: tuple[PairOverlap, ...]
    """Of every two adapters; the largest cosine by magnitude first."""

    frobenius: float
    """Of the summed delta over all sites."""

    relative: float | None
    """`frobenius` over the norm of all sites of the base, touched or not. None where no base was given."""

    @property
    def max_relative(self) -> float | None:
        """The largest relative norm of a site."""
        return max((site.relative for site in self.sites if site.relative is not None), default=None)


def diagnose_weights(
    adapters: Sequence[Adapter], weights: Sequence[float], base: Mapping[str, BaseNorm] | None = None
) -> WeightDiagnosis:
    """Describe `sum_i weights[i] * delta(adapters[i])`, site by site and pair by pair.

    Args:
        base: norms of every site of the base model.

    Raises:
        RequestError: no adapter, unequally many weights, or one that is not finite.
        AdapterMismatchError: two adapters differ in the size of a site; a site that the base has not.
    """
    if not adapters or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise RequestError(
            f"a mixture needs one finite weight for each adapter and at least one; got {list(weights)} "
            f"for {len(adapters)} adapters"
        )
    _check_sizes(adapters, base)
    deltas = [{site: svd_of_pair(pair) for site, pair in adapter.sites.items()} for adapter in adapters]
    sites = sorted({site for adapter in adapters for site in adapter.sites})
    found = [_site_delta(site, adapters, weights, base) for site in sites]
    pairs = [
        _pair_overlap(adapters[i], adapters[j], deltas[i], deltas[j])
        for i, j in combinations(range(len(adapters)), 2)
    ]
    frobenius = math.hypot(*(site.frobenius for site in found))
    whole = None if base is None else math.hypot(*(norm.frobenius for norm in base.values()))
    return WeightDiagnosis(
        names=tuple(adapter.name for adapter in adapters),
        weights=tuple(map(float, weights)),
        sites=tuple(
            sorted(found, key=lambda s: s.frobenius if s.relative is None else s.relative, reverse=True)
        ),
        pairs=tuple(sorted(pairs, key=lambda pair: abs(pair.cosine), reverse=True)),
        frobenius=frobenius,
        relative=None if whole is None else ratio(frobenius, whole),
    )


def svd_of_pair(pair: LoraPair) -> LowRankSvd:
    """The decomposition of a pair's delta."""
    return svd_of(pair.scaling * pair.lora_b.double(), pair.lora_a.double())


def _site_delta(
    site: str, adapters: Sequence[Adapter], weights: Sequence[float], base: Mapping[str, BaseNorm] | None
) -> SiteDelta:
    terms = [
        (a.sites[site], weight) for a, weight in zip(adapters, weights, strict=True) if site in a.sites
    ]
    b = torch.cat(
        [weight * pair.scaling * pair.lora_b.double() for pair, weight in terms], dim=1
    )  # [O, sum of R]
    total = svd_of(b, torch.cat([pair.lora_a.double() for pair, _ in terms]))
    return SiteDelta(
        site=site,
        num_adapters=len(terms),
        frobenius=total.frobenius,
        spectral=total.spectral,
        effective_rank=total.effective_rank,
        base=None if base is None else base[site],
    )


def _pair_overlap(
    first: Adapter, second: Adapter, deltas: Mapping[str, LowRankSvd], others: Mapping[str, LowRankSvd]
) -> PairOverlap:
    common = [site for site in first.sites if site in second.sites]
    inner = {site: inner_product(deltas[site], others[site]) for site in common}
    norms = [math.hypot(*(delta.frobenius for delta in of.values())) for of in (deltas, others)]
    cosines = [_cosine(inner[site], deltas[site].frobenius, others[site].frobenius) for site in common]
    # The subspaces of a delta of zero are no subspaces.
    met = [(deltas[site], others[site]) for site in common if deltas[site].rank and others[site].rank]
    return PairOverlap(
        first=first.name,
        second=second.name,
        num_common_sites=len(common),
        cosine=_cosine(math.fsum(inner.values()), *norms),
        max_site_cosine=max(cosines, key=abs, default=0.0),
        column_overlap=_mean(excess_overlap(a.u, b.u) for a, b in met),
        row_overlap=_mean(excess_overlap(a.v, b.v) for a, b in met),
    )


def excess_overlap(
    basis: torch.Tensor, other: torch.Tensor
) -> float:  # [n, p], [n, q], orthonormal columns
    """Return how much more two subspaces of R^n share than random ones of their sizes do.

    `||basis^T other||_F^2 / min(p, q) - max(p, q) / n`. The first term is 1 if one subspace holds the other and
    0 if they are orthogonal; the second is its expectation for subspaces drawn at random, since the expectation
    of the squared norm is `p q / n`.
    """
    return overlap(basis, other) - expected_overlap(basis.shape[0], basis.shape[1], other.shape[1])


def _check_sizes(adapters: Sequence[Adapter], base: Mapping[str, BaseNorm] | None) -> None:
    sizes: dict[str, tuple[int, int, str]] = {}
    for adapter in adapters:
        for site, pair in adapter.sites.items():
            if base is not None and site not in base:
                raise AdapterMismatchError(f"{adapter.label} has a site '{site}', which the base has not")
            *size, other = sizes.setdefault(site, (pair.in_features, pair.out_features, adapter.label))
            if size != [pair.in_features, pair.out_features]:
                raise AdapterMismatchError(
                    f"site '{site}' is (in, out) {tuple(size)} in {other} and "
                    f"{(pair.in_features, pair.out_features)} in {adapter.label}: they are for different models"
                )


def _cosine(inner: float, norm: float, other: float) -> float:
    return ratio(inner, norm * other)


def ratio(value: float, norm: float) -> float:
    """0 / 0 is 0, and any other value over nothing is without bound."""
    if value == 0.0:
        return 0.0
    return value / norm if norm else math.inf


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else 0.0
