"""Weights with which a mixture would not break: its parts in the same proportion, as strong as the probe allows."""

from __future__ import annotations

from dataclasses import dataclass

from manylora.lora.mixture import Mixture, MixtureLike
from manylora.models.image_probe import DenoiserChange, ImageProbe
from manylora.models.image_verdict import risk

MIN_FACTOR = 0.1
"""Below it nothing is left that would be worth a repair, not even of eight styles together."""

LIMIT = 0.6
"""Of `image_verdict.risk`, at which 1 is broken; at this or less a mixture is rarely even strained."""

NUM_HALVINGS = 5
"""Of the interval in which the factor lies: it comes out within 0.02."""


@dataclass(frozen=True)
class Repair:
    """What is proposed."""

    mixture: Mixture
    factor: float
    """By which every weight was multiplied; 1 where nothing had to be."""

    change: DenoiserChange
    """What the proposed mixture does."""

    mends: bool
    """Whether the probe finds the proposal safe. False: even at the least factor it does not."""


def repair(
    probe: ImageProbe, mixture: MixtureLike, change: DenoiserChange | None = None, *, limit: float = LIMIT
) -> Repair:
    """Return the strongest mixture of the same proportions whose risk is at most `limit`.

    The acceleration LoRA is in the probe's reference and keeps its weight: scaled down, few steps are too few.

    Args:
        change: what the mixture does, if the probe has said so already.
        limit: of `image_verdict.risk`, at which 1 is broken.
    """
    given = Mixture.parse(mixture)
    change = change or probe.change(given)
    if risk(change) <= limit:
        return Repair(given, 1.0, change, mends=True)
    safe, unsafe = MIN_FACTOR, 1.0
    best = probe.change(scaled(given, safe))
    if risk(best) > limit:
        return Repair(scaled(given, safe), safe, best, mends=False)
    for _ in range(NUM_HALVINGS):
        middle = (safe + unsafe) / 2
        tried = probe.change(scaled(given, middle))
        if risk(tried) <= limit:
            safe, best = middle, tried
        else:
            unsafe = middle
    return Repair(scaled(given, safe), safe, best, mends=True)


def scaled(mixture: Mixture, factor: float) -> Mixture:
    """Return the mixture with every weight times `factor`, rounded to what one would write."""
    return Mixture(tuple((name, round(weight * factor, 3)) for name, weight in mixture.weights))
