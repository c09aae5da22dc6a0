"""Will this mixture break the model? A verdict from what the probes showed, and its evidence.

The thresholds stand here and nowhere else; they were chosen on one small model. Weights alone give no verdict:
docs/diagnosis.md shows how little their norms and cosines tell.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manylora.models.probe import ProbeResult


class Level(enum.IntEnum):
    """How bad it is."""

    FINE = 0
    STRAINED = 1
    BROKEN = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Threshold:
    """Above which value a figure tells of strain, and above which of breaking."""

    figure: str
    strained: float
    broken: float

    def level(self, value: float) -> Level:
        return (
            Level.BROKEN if value > self.broken else Level.STRAINED if value > self.strained else Level.FINE
        )


LOSS_INCREASE = Threshold("loss_increase", strained=0.1, broken=0.4)
"""Plain language was lost. Where the rise of the probes' loss meets one of 0.15 and of 0.5 nats a token on held-out
text, by the straight line through the 18 mixtures of the curve in docs/diagnosis.md; rounded."""

KL = Threshold("kl", strained=1.0, broken=1.2)
"""The model predicts something else, whatever the probes' own words cost. On that curve no fine mixture is above 0.94
and no broken one below 1.46; broken is the middle, strained just above the fine ones."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure beside its thresholds."""

    value: float
    threshold: Threshold
    words: str
    """What the figure is, with its value."""

    @property
    def level(self) -> Level:
        return self.threshold.level(self.value)

    def __str__(self) -> str:
        limits = f"strained above {self.threshold.strained:g}, broken above {self.threshold.broken:g}"
        return f"{self.words} ({limits}): {self.level}"


@dataclass(frozen=True)
class Verdict:
    """The level, which is that of the worst finding, and the evidence."""

    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]
    """What explains the level and did not decide it."""

    @property
    def level(self) -> Level:
        return max(finding.level for finding in self.findings)


def judge(result: ProbeResult, names: Sequence[str]) -> Verdict:
    """Judge a mixture by its probes.

    Args:
        names: of the parts, in the order of `result.parts`.
    """
    mixture = result.mixture
    findings = (
        Finding(
            mixture.loss_increase,
            LOSS_INCREASE,
            f"the loss of the probe texts changes by {mixture.loss_increase:+.3f} nats a token, "
            f"a perplexity {mixture.perplexity_ratio:.3g} times the base's",
        ),
        Finding(mixture.kl, KL, f"KL(base || mixture) is {mixture.kl:.3g} nats a token"),
    )
    return Verdict(findings, tuple(_remarks(result, names)))


def _remarks(result: ProbeResult, names: Sequence[str]) -> Iterator[str]:
    yield f"the likeliest next token stays the same at {result.mixture.top1_agreement:.0%} of positions"
    if len(result.parts) < 2:
        return
    largest, name = max(zip(result.parts, names, strict=True), key=lambda part: part[0].kl)
    alone = max(LOSS_INCREASE.level(largest.loss_increase), KL.level(largest.kl))
    yield (
        f"of the parts alone, '{name}' moves the model most: KL {largest.kl:.3g}, "
        f"loss {largest.loss_increase:+.3f}, {alone}"
    )
    if result.non_additivity is not None:
        yield f"non-additivity of the logits is {result.non_additivity:.2f} (0: each part acts as it does alone)"
