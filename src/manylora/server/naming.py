"""Which adapters a request names, and how much of each. Knows neither which exist nor who may see them.

"model": "base"                                    the base
"model": "pirate"                                  one adapter
"model": "pirate:0.8+json:-0.5"                    a mixture, where a client can set nothing else
"model": "base", "lora": {"pirate": 0.8}           the same as a field of its own
"model": "base", "lora": [{"name": "pirate", "weight": 0.8}]
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from manylora.server.api_errors import ApiError

Weights = tuple[tuple[str, float], ...]
"""(adapter name, weight), sorted by name, each name once, no weight 0; empty is the base."""


def weights_of(model: str, lora: Iterable[tuple[str, float]] | None, *, base: str) -> Weights:
    """Return the mixture of a request.

    Weights of one name are summed, and 0 is dropped: it changes nothing. The base may stand among the terms, where it
    means nothing, since every mixture contains it once.

    Args:
        model: the field of that name.
        lora: the extension field, as pairs; None if it was not given.
        base: what the base is called.
    Raises:
        ApiError: 400; a term is malformed, a weight is not finite, or adapters are named in both places.
    """
    named_by_model = [] if model == base else [_term(term, model) for term in model.split("+")]
    adapters = _summed(((name, w) for name, w in named_by_model if name != base), "model")
    if lora is None:
        return adapters
    if adapters:
        raise ApiError(
            400,
            f"adapters are named by `model` ({model!r}) and by `lora`; name them in one place, "
            f"and let `model` be {base!r} beside `lora`",
            param="lora",
        )
    return _summed(((name, w) for name, w in lora if name != base), "lora")


def _term(term: str, model: str) -> tuple[str, float]:
    """Read "name" or "name:weight"."""
    name, colon, weight = term.strip().rpartition(":")
    name = name if colon else weight
    if not name.strip():
        raise ApiError(
            400,
            f"model {model!r} has a term without a name; write name:weight, joined by '+'",
            param="model",
        )
    try:
        return name, float(weight) if colon else 1.0
    except ValueError:
        raise ApiError(
            400,
            f"model {model!r}: {weight!r} after '{name}:' is no number; write name:weight, joined by '+'",
            param="model",
        ) from None


def _summed(terms: Iterable[tuple[str, float]], param: str) -> Weights:
    totals: dict[str, float] = {}
    for name, weight in terms:
        totals[name] = totals.get(name, 0.0) + weight
    for name, total in totals.items():
        if not math.isfinite(total):
            raise ApiError(
                400, f"the weight of adapter {name!r} must be a finite number, got {total}", param=param
            )
    return tuple(sorted((name, total) for name, total in totals.items() if total != 0))
