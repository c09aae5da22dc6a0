"""A mixture: which adapters, each with which weight. Names only; knows no file and no tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TypeAlias

from manylora.errors import RequestError

MAX_WEIGHT = 3.4e38
"""Kernels hold weights in float32, to which more is infinite."""


@dataclass(frozen=True)
class Mixture:
    """`y = W x + sum_i weight_i * scaling_i * B_i (A_i x)` over the adapters named; none is the base."""

    weights: tuple[tuple[str, float], ...]
    """(adapter name, weight), sorted by name, each name once. Weight 0 is dropped: it changes nothing."""

    def __post_init__(self) -> None:
        checked = sorted((_checked_name(name), _checked_weight(name, w)) for name, w in self.weights)
        for (name, _), (after, _) in pairwise(checked):
            if name == after:
                raise RequestError(f"a mixture names the adapter '{name}' twice; add its weights up")
        object.__setattr__(self, "weights", tuple((name, w) for name, w in checked if w != 0.0))

    @classmethod
    def parse(cls, spec: MixtureLike) -> Mixture:
        """Read what a request gives: "alice", "alice:0.8", "alice:1.0+bob:0.5", a mapping, pairs.

        None and an empty mapping are the base. A name without a weight has weight 1.

        Raises:
            RequestError: a name is empty, stands twice or holds "+" or ":"; a weight is no finite number.
        """
        if spec is None:
            return BASE
        if isinstance(spec, Mixture):
            return spec
        if isinstance(spec, str):
            return cls(tuple(_parse_term(term, spec) for term in spec.split("+")))
        try:
            pairs = tuple((name, w) for name, w in (spec.items() if isinstance(spec, Mapping) else spec))
        except (TypeError, ValueError):
            raise RequestError(
                f"expected a mixture like 'a:1+b:0.5' or {{'a': 1.0}}, got {spec!r}"
            ) from None
        return cls(pairs)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.weights)

    def __bool__(self) -> bool:
        """False for the base."""
        return bool(self.weights)

    def __str__(self) -> str:
        return "+".join(f"{name}:{_format_weight(w)}" for name, w in self.weights) or "base"


BASE = Mixture(())

MixtureLike: TypeAlias = str | Mapping[str, float] | Iterable[tuple[str, float]] | Mixture | None
"""What `Mixture.parse` reads."""


def _parse_term(term: str, spec: str) -> tuple[str, float]:
    name, colon, weight = term.strip().rpartition(":")
    if not colon:
        return weight, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise RequestError(
            f"mixture '{spec}': '{weight}' after '{name}:' is no number; write name:weight, joined by '+'"
        ) from None


def _format_weight(weight: float) -> str:
    # "+" joins terms, so an exponent is written without it; parse(str(mixture)) gives the mixture back.
    return repr(weight).removesuffix(".0").replace("e+", "e")


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"a mixture names an adapter {name!r}; expected a name that is not empty")
    if "+" in name or ":" in name:
        raise RequestError(f"adapter name '{name}' holds '+' or ':', which separate the terms of a mixture")
    return name


def _checked_weight(name: object, weight: object) -> float:
    try:
        value = float(weight) if not isinstance(weight, bool) and isinstance(weight, Real) else math.nan
    except OverflowError:  # an integer beyond the floats
        value = math.inf
    if not abs(value) <= MAX_WEIGHT:  # so written, it refuses NaN too
        raise RequestError(f"weight of adapter {name!r} must be a finite number, got {weight!r}")
    return value
