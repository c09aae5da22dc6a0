"""The next token of every sequence of a step, from the model's logits.

Order for a random row: penalties (which stand for biases, bans and forms too), temperature, top_k, top_p, min_p, draw.
A greedy row takes the largest score after penalties; without any, the largest logit itself.
"""

# Shapes: N rows (sequences of the step), V tokens of the vocabulary, M rows that need more than an argmax.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.kernels import ops
from manylora.text.draws import draw, random_bits, sample_seed
from manylora.text.filters import token_weights
from manylora.text.params import SamplingParams
from manylora.text.penalties import apply_penalties
from manylora.text.sampling_row import SamplingRow

__all__ = ["SampledToken", "SamplingParams", "SamplingRow", "TokenLogprobs", "TokenSampler", "sample_seed"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities under the model itself: log_softmax of its logits, before penalties and filters."""

    sampled: float
    """Of the sampled token; -inf where that was impossible to the model's fp32 precision."""

    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the most likely tokens, most likely first."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What was chosen for one row."""

    token_id: int | None
    """None: no token can be chosen, since the row's largest score is not finite."""

    logprobs: TokenLogprobs | None = None
    """None: not asked for, or no token."""

    is_sound: bool = True
    """Whether the largest of the model's own logits is finite: no NaN, no overflow."""


class TokenSampler:
    """Chooses tokens. Holds no state: what a row gets depends on its logits and its SamplingRow alone."""

    def sample(
        self,
        logits: Tensor,  # [N, V]  fp32 or fp64, not changed
        rows: Sequence[SamplingRow],  # N
    ) -> list[SampledToken]:
        """Choose the next token of each row."""
        assert logits.dtype in (torch.float32, torch.float64), logits.dtype
        assert logits.shape[0] == len(rows), (logits.shape, len(rows))
        token_ids = _largest(logits)
        is_sound = [token_id is not None for token_id in token_ids]
        # A row whose logits are not finite keeps its None; changed scores could only hide that.
        special = [
            i for i, row in enumerate(rows)
            if is_sound[i] and (row.changes_scores or not row.params.is_greedy)
        ]  # fmt: skip
        if special:
            chosen = _choose(logits[special], [rows[i] for i in special])
            for i, token_id in zip(special, chosen, strict=True):
                token_ids[i] = token_id
        logprobs = _logprobs(logits, rows, token_ids)
        return [
            SampledToken(token_id, logprobs.get(i), is_sound[i]) for i, token_id in enumerate(token_ids)
        ]


def _largest(scores: Tensor) -> list[int | None]:
    """Return each row's argmax; None where that is infinite, or a score is NaN."""
    if scores.shape[0] == 0:
        return []
    marked: list[int] = ops.argmax(scores).tolist()
    return [None if token_id < 0 else token_id for token_id in marked]


def _choose(
    scores: Tensor,  # [M, V]  logits, changed in place
    rows: Sequence[SamplingRow],  # M
) -> list[int | None]:
    """Choose tokens where an argmax of the logits is not enough."""
    apply_penalties(scores, rows)
    token_ids = _largest(scores)
    random = [i for i, row in enumerate(rows) if token_ids[i] is not None and not row.params.is_greedy]
    if random:
        weights = token_weights(scores[random], [rows[i].params for i in random])
        bits = [random_bits(rows[i].seed, len(rows[i].output_token_ids)) for i in random]
        for i, token_id in zip(random, draw(weights, bits), strict=True):
            token_ids[i] = token_id
    return token_ids


def _logprobs(
    logits: Tensor,  # [N, V]
    rows: Sequence[SamplingRow],  # N
    token_ids: Sequence[int | None],  # N
) -> dict[int, TokenLogprobs]:
    """Return the log-probabilities of the rows that asked for them, by row."""
    wanted = {
        i: (token_id, num_top)
        for i, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
        if (num_top := row.params.logprobs) is not None and token_id is not None
    }
    if not wanted:
        return {}
    logprobs = logits[list(wanted)].log_softmax(dim=-1)
    sampled_ids = torch.tensor([token_id for token_id, _ in wanted.values()], device=logits.device)
    sampled = logprobs.gather(-1, sampled_ids[:, None])[:, 0].tolist()
    most = min(max(num_top for _, num_top in wanted.values()), logits.shape[1])
    top = logprobs.topk(most, dim=-1)
    top_ids, top_values = top.indices.tolist(), top.values.tolist()
    return {
        i: TokenLogprobs(sampled[j], tuple(zip(top_ids[j][:num_top], top_values[j][:num_top], strict=True)))
        for j, (i, (_, num_top)) in enumerate(wanted.items())
    }
