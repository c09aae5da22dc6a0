"""Several weighted adapters made into one: exactly, at a smaller rank, or by TIES or DARE. Knows no file.

Serving needs none of this: it adds the deltas of a mixture as they are. This is for a mixture that must be a file.
"""

# Shapes: O out-features, D in-features, R rank of one adapter or of all together. Computed in float64.

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from manylora.errors import AdapterMismatchError, ConfigError, RequestError
from manylora.lora.adapter import ADAPTER_DTYPES, Adapter, LoraPair, widest
from manylora.lora.low_rank import factorise, product_distance, product_norm, truncate
from manylora.lora.merge import dare, ties

Method = Literal["exact", "svd", "ties", "dare"]

USES: dict[str, tuple[str, ...]] = {
    "exact": (),
    "svd": ("rank",),
    "ties": ("density", "rank"),
    "dare": ("density", "rank", "seed"),
}
"""The options of each method; the first of them it needs."""

FLOAT64_NOISE = 1e-13
"""Of what float64 itself rounds off in products of small matrices; far below the rounding of any result."""

Factors = tuple[Tensor, Tensor]
"""b [O, R] and a [R, D], float64; a delta is b @ a."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposeOptions:
    """How to compose. An option that the method does not use must be left None."""

    method: Method = "exact"
    """exact stacks the ranks. svd is the best approximation of the sum at a smaller rank. ties and dare merge the
    entries of the deltas, which leaves no small rank, and approximate the outcome."""

    rank: int | None = None
    """The largest rank of a site. ties and dare: the sum of the adapters' ranks there if None."""

    density: float | None = None
    """The share of entries that ties and dare keep, above 0 and up to 1."""

    seed: int | None = None
    """Which entries dare keeps; 0 if None."""

    dtype: torch.dtype | None = None
    """Of the result. If None float32, or the adapters' own where that holds an exact composition exactly."""

    def __post_init__(self) -> None:
        if self.method not in USES:
            raise ConfigError(f"unknown method {self.method!r} of composition; known: {list(USES)}")
        uses = USES[self.method]
        for option in ("rank", "density", "seed"):
            given = getattr(self, option) is not None
            if given and option not in uses:
                raise ConfigError(f"method '{self.method}' does not use {option}; leave it out")
            if not given and option in uses[:1]:
                raise ConfigError(f"method '{self.method}' needs {option}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ConfigError(f"density must be above 0 and at most 1, got {self.density}")
        if self.dtype is not None and self.dtype not in ADAPTER_DTYPES:
            raise ConfigError(f"dtype must be one of {list(ADAPTER_DTYPES)}, got {self.dtype}")


@dataclass(frozen=True)
class Composition:
    """One adapter made of several, and how far it is from what the method asked for."""

    adapter: Adapter
    method: Method
    error_by_site: dict[str, float]
    """Lost to truncation and rounding: the Frobenius norm of (the adapter's delta - the method's) over that of the
    method's. The method's delta is the weighted sum for exact and svd, the merged one for ties and dare."""

    error: float
    """The same over all sites together."""


class _Term(NamedTuple):
    """One adapter's part at one site."""

    key: str
    """Tells the adapters apart, whatever their order and names."""

    pair: LoraPair
    coefficient: float
    """weight * scaling."""

    def factors(self) -> Factors:
        return self.coefficient * self.pair.lora_b.double(), self.pair.lora_a.double()

    def delta(self) -> Tensor:  # [O, D]
        b, a = self.factors()
        return b @ a


class _Composed(NamedTuple):
    """What a method made of one site."""

    pair: LoraPair
    distance: float
    """Frobenius norm of the pair's delta less the method's."""

    norm: float
    """Frobenius norm of the method's delta."""


def compose(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method = "exact",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> Composition:
    """Make one adapter of `sum_i weights[i] * delta(adapters[i])`, or of what another method makes of these deltas.

    One adapter at weight 1 gives itself back, exact to the bit. The order of the adapters does not matter.
    Sites that only some of the adapters have are composed of those; weights may be negative.

    Args:
        rank, density, seed, dtype: see `ComposeOptions`.
        name: of the result; the adapters' names and weights by default.

    Raises:
        ConfigError: an option that the method needs is missing, or one is given that it does not use.
        RequestError: a weight is not finite, or no weight is other than 0.
        AdapterMismatchError: two adapters have a site in common, in different sizes.
    """
    options = ComposeOptions(method=method, rank=rank, density=density, seed=seed, dtype=dtype)
    weighted = _weighted(adapters, weights)
    by_site = _terms_by_site(weighted)
    bases = {adapter.base_model for adapter, _ in weighted}
    parts = "+".join(f"{adapter.name}:{weight:g}" for adapter, weight in weighted)
    result = Adapter(
        {},
        name=parts if name is None else name,
        base_model=bases.pop() if len(bases) == 1 else None,
    )
    [(first, weight), *others] = weighted
    if not others and weight == 1.0 and method == "exact" and dtype in (None, first.dtype):
        return Composition(replace(result, sites=first.sites), method, dict.fromkeys(first.sites, 0.0), 0.0)
    target = _dtype(options, by_site)
    composed = {site: _compose_site(site, terms, options, target) for site, terms in by_site.items()}
    return Composition(
        replace(result, sites={site: of.pair for site, of in composed.items()}),
        method,
        {site: _ratio(of.distance, of.norm) for site, of in composed.items()},
        _ratio(
            math.hypot(*(of.distance for of in composed.values())),
            math.hypot(*(of.norm for of in composed.values())),
        ),
    )


def _weighted(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[tuple[Adapter, float]]:
    """The adapters of weight other than 0, in an order that their content decides."""
    if len(adapters) != len(weights):
        raise RequestError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not math.isfinite(weight):
            raise RequestError(f"the weight of {adapter.label} must be a finite number, got {weight}")
    weighted = [
        (adapter, float(weight)) for adapter, weight in zip(adapters, weights, strict=True) if weight
    ]
    if not weighted:
        raise RequestError("nothing to compose: no adapter has a weight other than 0")
    return sorted(weighted, key=lambda pair: (pair[0].identity, pair[1]))


def _terms_by_site(weighted: Sequence[tuple[Adapter, float]]) -> dict[str, list[_Term]]:
    by_site: dict[str, list[_Term]] = {}
    times: Counter[str] = Counter()
    for adapter, weight in weighted:
        key = f"{adapter.identity}/{times[adapter.identity]}"
        times[adapter.identity] += 1
        for site, pair in adapter.sites.items():
            terms = by_site.setdefault(site, [])
            if terms and _size(terms[0].pair) != _size(pair):
                raise AdapterMismatchError(
                    f"{adapter.label} is for another model than the rest: its site '{site}' has (in, out, kernel) "
                    f"{_size(pair)}, expected {_size(terms[0].pair)}"
                )
            terms.append(_Term(key, pair, weight * pair.scaling))
    return by_site


def _size(pair: LoraPair) -> tuple[object, ...]:
    return pair.in_features, pair.out_features, pair.kernel_size


def _dtype(options: ComposeOptions, by_site: Mapping[str, Sequence[_Term]]) -> torch.dtype:
    terms = [term for of_site in by_site.values() for term in of_site]
    own = widest(term.pair.dtype for term in terms)
    if options.dtype is not None:
        return options.dtype
    if options.method != "exact" or own == torch.float32:
        return torch.float32
    holds = all(torch.equal(b.to(own).double(), b) for b, _ in (term.factors() for term in terms))
    return own if holds else torch.float32


def _compose_site(
    site: str, terms: Sequence[_Term], options: ComposeOptions, dtype: torch.dtype
) -> _Composed:
    factors = [term.factors() for term in terms]
    stacked = torch.cat([b for b, _ in factors], dim=1), torch.cat([a for _, a in factors], dim=0)
    merged = _merged(site, terms, options)
    if merged is not None:
        b, a = factorise(merged, options.rank or stacked[1].shape[0])
    elif options.rank is not None:
        b, a = truncate(*stacked, options.rank)
    else:
        b, a = stacked
    pair = LoraPair(a.to(dtype), b.to(dtype), 1.0, terms[0].pair.kernel_size)
    rounded = pair.lora_b.double(), pair.lora_a.double()
    if not all(factor.isfinite().all() for factor in rounded):
        raise RequestError(f"site '{site}': the composition does not fit into {dtype}; use smaller weights")
    if merged is not None:
        distance, norm = float((rounded[0] @ rounded[1] - merged).norm()), float(merged.norm())
    else:
        distance, norm = product_distance(rounded, stacked), product_norm(*stacked)
    # What float64 itself rounds off is no error of the method, though beside a sum that cancels it would look large.
    noise = FLOAT64_NOISE * float(stacked[0].norm() * stacked[1].norm())
    return _Composed(pair, 0.0 if distance <= noise else distance, norm)


def _merged(site: str, terms: Sequence[_Term], options: ComposeOptions) -> Tensor | None:
    """The delta [O, D] of the methods that form one."""
    if options.density is None:
        return None
    if options.method == "ties":
        return ties([term.delta for term in terms], options.density)
    return dare({f"{site}/{term.key}": term.delta for term in terms}, options.density, options.seed or 0)


def _ratio(distance: float, norm: float) -> float:
    if distance == 0.0:
        return 0.0
    return distance / norm if norm else math.inf
