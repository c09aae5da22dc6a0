"""Repetition, presence and frequency penalties, and banned tokens.

Order: repetition, then frequency and presence (as vLLM), then bans. Repetition counts prompt and output
(as transformers' RepetitionPenaltyLogitsProcessor); presence and frequency count the output only (as
OpenAI and vLLM).
"""

# Shapes: M rows, V tokens of the vocabulary, E (row, token) pairs of all rows together.

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from manylora.text.sampling_row import SamplingRow


def apply_penalties(
    scores: Tensor,  # [M, V]  logits, changed in place
    rows: Sequence[SamplingRow],  # M
) -> None:
    """Apply each row's penalties and bans to its scores. Rows without any cost nothing."""
    _penalise_repetition(scores, rows)
    _penalise_output(scores, rows)
    banned = _Pairs()
    for index, row in enumerate(rows):
        banned.extend(index, row.banned_token_ids)
    if banned.rows:
        scores[banned.where(scores)] = -torch.inf


class _Pairs:
    """E (row, token) pairs, to index scores with all rows at once. A pair is held once."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.token_ids: list[int] = []

    def extend(self, row: int, token_ids: Sequence[int]) -> None:
        self.rows.extend([row] * len(token_ids))
        self.token_ids.extend(token_ids)

    def where(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.rows, device=scores.device), torch.tensor(
            self.token_ids, device=scores.device
        )


def _penalise_repetition(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    seen, factors = _Pairs(), list[float]()
    for index, row in enumerate(rows):
        if row.params.repetition_penalty != 1:
            token_ids = list({*row.prompt_token_ids, *row.output_token_ids})
            seen.extend(index, token_ids)
            factors.extend([row.params.repetition_penalty] * len(token_ids))
    if seen.rows:
        where = seen.where(scores)
        before_E = scores[where]
        factor_E = torch.tensor(factors, device=scores.device, dtype=scores.dtype)
        scores[where] = torch.where(before_E > 0, before_E / factor_E, before_E * factor_E)


def _penalise_output(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    seen, losses = _Pairs(), list[float]()
    for index, row in enumerate(rows):
        presence, frequency = row.params.presence_penalty, row.params.frequency_penalty
        if presence or frequency:
            counts = Counter(row.output_token_ids)
            seen.extend(index, list(counts))
            losses.extend(presence + frequency * count for count in counts.values())
    if seen.rows:
        scores[seen.where(scores)] -= torch.tensor(losses, device=scores.device, dtype=scores.dtype)
