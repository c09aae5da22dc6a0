"""Will this mixture break the pictures? A verdict from what the probe of the denoiser showed, and its evidence.

The thresholds stand here and nowhere else. `scripts/mixture_breaks.py` measures sets of LoRAs whose breaking a judge of
pictures has seen, and its report prints which figures tell, and the thresholds that one half of the sets gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from manylora.models.image_probe import DenoiserChange, ImageProbeResult
from manylora.models.verdict import Finding, Threshold, Verdict

PROMPT_DISAGREEMENT = Threshold("prompt_disagreement", strained=0.06, broken=0.15)
"""Prompts do not mean what they meant."""

DIVERGENCE = Threshold("divergence", strained=0.28, broken=0.43)
"""The pictures are others, whatever the prompts mean: a style alone moves them, so this is large before it is bad."""


def judge_image(result: ImageProbeResult, names: Sequence[str]) -> Verdict:
    """Judge a mixture by its probe.

    Args:
        names: of the parts, in the order of `result.parts`.
    """
    return Verdict(_findings(result.mixture), tuple(_remarks(result, names)))


def risk(change: DenoiserChange) -> float:
    """Return one number that grows with the danger: above 1 the verdict is broken."""
    return max(finding.value / finding.threshold.broken for finding in _findings(change))


def _findings(change: DenoiserChange) -> tuple[Finding, ...]:
    return (
        Finding(
            change.prompt_disagreement,
            PROMPT_DISAGREEMENT,
            f"what a caption changes keeps {1 - change.prompt_disagreement:.0%} of its direction, a disagreement of "
            f"{change.prompt_disagreement:.2f}",
        ),
        Finding(
            change.divergence,
            DIVERGENCE,
            f"predicted pictures differ by {change.divergence:.2f} of their size",
        ),
    )


def _remarks(result: ImageProbeResult, names: Sequence[str]) -> Iterator[str]:
    mixture = result.mixture
    levels = ", ".join(
        f"{value:.2f} at t={t}"
        for t, value in zip(result.timesteps, mixture.divergence_by_level, strict=True)
    )
    yield f"measured against {result.reference}; by noise level the difference is {levels}"
    yield (
        f"a caption changes {mixture.prompt_gain:.2f} times as much as it did; one step further down its own "
        f"trajectory predictions differ by {mixture.residual:.2f} ({result.reference_residual:.2f} without the mixture)"
    )
    if len(result.parts) < 2:
        return
    largest, name = max(zip(result.parts, names, strict=True), key=lambda part: risk(part[0]))
    alone = max(finding.level for finding in _findings(largest))
    yield (
        f"of the parts alone, '{name}' weighs most: disagreement {largest.prompt_disagreement:.2f}, "
        f"difference {largest.divergence:.2f}, {alone}"
    )
    if result.non_additivity is not None:
        yield f"non-additivity is {result.non_additivity:.2f} (0: each part acts as it does alone)"
