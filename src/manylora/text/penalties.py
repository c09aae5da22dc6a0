"""What changes the scores before a token is chosen: penalties, biases, banned tokens, the form of the answer.

Order: repetition, then frequency and presence (as vLLM), then biases, bans and forms. Repetition counts prompt and
output (as transformers' RepetitionPenaltyLogitsProcessor); presence and frequency count the output only (as OpenAI and
vLLM).
"""

# Shapes: M rows, V tokens of the vocabulary, E (row, token) pairs of all rows together, F rows that have a guide.

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from manylora.text.sampling_row import SamplingRow


def apply_penalties(
    scores: Tensor,  # [M, V]  logits, changed in place
    rows: Sequence[SamplingRow],  # M
) -> None:
    """Change each row's scores by all that it has of these. Rows without any cost nothing."""
    _penalise_repetition(scores, rows)
    _penalise_output(scores, rows)
    _add_biases(scores, rows)
    banned = _Pairs()
    for index, row in enumerate(rows):
        banned.extend(index, row.banned_token_ids)
    if banned.rows:
        scores[banned.where(scores)] = -torch.inf
    _keep_to_form(scores, rows)


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


def _add_biases(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    biased, biases = _Pairs(), list[float]()
    for index, row in enumerate(rows):
        biased.extend(index, list(row.params.logit_bias))
        biases.extend(row.params.logit_bias.values())
    if biased.rows:
        scores[biased.where(scores)] += torch.tensor(biases, device=scores.device, dtype=scores.dtype)


def _keep_to_form(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    guides = {index: row.guide for index, row in enumerate(rows) if row.guide is not None}
    if not guides:
        return
    bits = np.stack([np.frombuffer(guide.allowed(), dtype=np.uint8) for guide in guides.values()])
    allowed_FV = np.unpackbits(bits, axis=1, count=scores.shape[1], bitorder="little").astype(bool)
    forbidden_FV = torch.from_numpy(~allowed_FV).to(scores.device)
    guided = list(guides)
    scores[guided] = scores[guided].masked_fill(forbidden_FV, -torch.inf)
