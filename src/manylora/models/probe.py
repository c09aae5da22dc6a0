"""What a mixture does to a decoder's predictions on a few texts, beside what each of its parts does alone."""

# Shapes: M variants (the base, the mixture, each part alone), P tokens of the texts of a group, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.errors import RequestError
from manylora.lora.adapter import Adapter
from manylora.models.llama import Llama
from manylora.models.side_by_side import SideBySide

MAX_ROWS = 1024
"""Rows of a forward pass, unless one text alone needs more. Logits are this times the vocabulary."""

NO_TARGET = -1

Text = Sequence[int]
"""Token ids."""


@dataclass(frozen=True, slots=True)
class Change:
    """How one variant predicts, measured against the base, over all tokens of all texts."""

    kl: float
    """Mean of KL(base || variant) over positions, in nats; inf where logits are not finite."""

    top1_agreement: float
    """Share of positions whose likeliest next token is the base's."""

    loss_increase: float
    """Rise of the mean loss of the texts' own next tokens, in nats a token; negative where it fell."""

    @property
    def perplexity_ratio(self) -> float:
        """The variant's perplexity of the texts over the base's."""
        return math.exp(self.loss_increase) if self.loss_increase < 700 else math.inf


@dataclass(frozen=True)
class ProbeResult:
    """What the texts showed."""

    num_positions: int
    base_loss: float
    """Of the base itself, in nats a token."""

    mixture: Change
    parts: tuple[Change, ...]
    """Each adapter alone, at its weight in the mixture."""

    non_additivity: float | None
    """`||d - sum_i d_i|| / ||sum_i d_i||` over all positions, d the change of the logits by the mixture, d_i by part i
    alone. 0: each part acts as if it were alone. Each d is centred over the vocabulary, since a shift common to all
    logits of a position changes no prediction. None for a single part, or where the parts change nothing."""


def probe(
    model: Llama, texts: Sequence[Text], adapters: Sequence[Adapter], weights: Sequence[float]
) -> ProbeResult:
    """Run the base, the mixture and its single parts side by side on `texts`.

    Raises:
        RequestError: no adapter, unequally many weights, or a text of fewer than two tokens: it predicts nothing.
        AdapterMismatchError: an adapter does not fit the model.
    """
    if not texts or min(map(len, texts)) < 2 or not adapters or len(adapters) != len(weights):
        raise RequestError(
            "a probe needs texts of at least 2 tokens, and adapters with a weight each; got texts of "
            f"{[len(text) for text in texts]} tokens, {len(adapters)} adapters, {len(weights)} weights"
        )
    num_parts = len(adapters) if len(adapters) > 1 else 0
    parts = [[w if i == j else 0.0 for j, w in enumerate(weights)] for i in range(num_parts)]
    mixtures = [[0.0] * len(weights), list(weights), *parts]
    runner = SideBySide(model, adapters)
    base, sums, additivity = _Sums(), [_Sums() for _ in mixtures[1:]], _Additivity()
    for group in _groups(texts, MAX_ROWS // len(mixtures)):
        logits = runner.logits(group, mixtures)  # [M, P, V]
        targets = torch.tensor(_targets(group), device=logits.device)
        reference = torch.log_softmax(logits[0], dim=-1)
        base.add(reference, reference, targets)
        for variant, into in zip(logits[1:], sums, strict=True):
            into.add(torch.log_softmax(variant, dim=-1), reference, targets)
        if parts:
            additivity.add(logits)
    changes = [total.against(base) for total in sums]
    return ProbeResult(
        num_positions=base.num_positions,
        base_loss=base.loss / base.num_targets,
        mixture=changes[0],
        parts=tuple(changes[1:] or changes),
        non_additivity=additivity.ratio,
    )


@dataclass
class _Sums:
    """Sums over positions, of one variant."""

    num_positions: int = 0
    num_targets: int = 0
    kl: float = 0.0
    num_agreeing: int = 0
    loss: float = 0.0

    def add(self, logprobs: Tensor, reference: Tensor, targets: Tensor) -> None:  # [P, V], [P, V], [P]
        predicts = targets != NO_TARGET
        self.num_positions += len(targets)
        self.num_targets += int(predicts.sum())
        self.kl += float((reference.exp() * (reference - logprobs)).sum())
        self.num_agreeing += int((logprobs.argmax(dim=-1) == reference.argmax(dim=-1)).sum())
        self.loss -= float(logprobs[predicts].gather(1, targets[predicts, None]).sum())

    def against(self, base: _Sums) -> Change:
        kl, rise = self.kl / self.num_positions, (self.loss - base.loss) / self.num_targets
        return Change(
            # Rounding may leave a KL of zero a little below.
            kl=max(0.0, kl) if math.isfinite(kl) else math.inf,
            top1_agreement=self.num_agreeing / self.num_positions,
            loss_increase=rise if math.isfinite(rise) else math.inf,
        )


@dataclass
class _Additivity:
    """Squared norms over positions: of the change that the parts' changes do not add up to, and of their sum."""

    residual: float = 0.0
    total: float = 0.0

    def add(self, logits: Tensor) -> None:  # [M, P, V]: base, mixture, parts
        change = (part - logits[0] for part in logits[1:])
        change = (part - part.mean(dim=-1, keepdim=True) for part in change)
        of_mixture, *of_parts = change
        additive = torch.stack(of_parts).sum(dim=0)
        self.residual += float((of_mixture - additive).square().sum())
        self.total += float(additive.square().sum())

    @property
    def ratio(self) -> float | None:
        if not self.total:
            return None
        ratio = math.sqrt(self.residual / self.total)
        return ratio if math.isfinite(ratio) else math.inf


def _targets(texts: Sequence[Text]) -> list[int]:
    """The token that each position should predict; the last of a text predicts none."""
    return [target for text in texts for target in (*text[1:], NO_TARGET)]


def _groups(texts: Sequence[Text], max_tokens: int) -> Iterator[list[Text]]:
    """Texts in order, as many together as have `max_tokens`."""
    group: list[Text] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > max_tokens:
            yield group
            group = []
        group.append(text)
    yield group
