"""Temperature, top_k, top_p and min_p: what each row may draw, as integer weights.

Order: temperature, top_k, top_p, min_p, as transformers' GenerationMixin. (vLLM applies min_p before
top_k and top_p; the two differ only where top_p and min_p both cut.)

Weights are integers because integer sums are exact in any order. A float sum over the vocabulary depends
on how a device splits it, and that depends on the batch; so would then, now and then, the token. The
other operations here act on single elements or choose among them, and give the same bits wherever a row
stands.
"""

# Shapes: M rows, V tokens of the vocabulary, F rows that have the filter, K most likely tokens.

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from manylora.text.params import SamplingParams


def token_weights(
    scores: Tensor,  # [M, V]  logits after penalties, fp32; each row's largest is finite. Changed in place.
    params: Sequence[SamplingParams],  # M
    num_sorted: int = 256,
) -> Tensor:  # [M, V]  int64
    """Return weights proportional to the probabilities left by the filters: 0 for a token that was cut.

    weight = floor(exp((score - largest score) / temperature) * 2^b), b the same for all rows, as large as
    lets the sum of V weights fit an int64: 46 for a vocabulary of 49,152. A token less than 2^-b times as
    likely as the most likely one gets 0.

    Args:
        num_sorted: top_p looks for its cut among so many most likely tokens, then among 16 times as many, and so
            on. The result does not depend on it; sorting all of 49,152 takes 19 times as long as finding 256.
    """
    weight_bits = 62 - scores.shape[1].bit_length()
    temperatures = torch.tensor([p.temperature for p in params], device=scores.device, dtype=scores.dtype)
    scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    _cut_top_k(scores, params)
    weights = scores.exp_().mul_(2.0**weight_bits).to(torch.int64)

    # The largest score is now exp(0): every row's largest weight is 2^weight_bits.
    cuts = [math.ceil(p.min_p * 2**weight_bits) for p in params]
    smallest_kept = torch.tensor(cuts, device=scores.device)
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1]
    if nucleus:
        top_p = torch.tensor([params[i].top_p for i in nucleus], device=scores.device, dtype=torch.float32)
        nucleus_cut = _nucleus_cut(weights[nucleus], top_p, num_sorted)
        smallest_kept[nucleus] = torch.maximum(smallest_kept[nucleus], nucleus_cut)
    if nucleus or any(cuts):
        weights.masked_fill_(weights < smallest_kept[:, None], 0)
    return weights


def _cut_top_k(
    scores: Tensor,  # [M, V]  changed in place
    params: Sequence[SamplingParams],  # M
) -> None:
    """Set the scores below each row's k-th largest to -inf; scores equal to the k-th stay."""
    vocab_size = scores.shape[1]
    limited = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if not limited:
        return
    top_k_F = torch.tensor([params[i].top_k for i in limited], device=scores.device)
    top_FK = scores[limited].topk(max(params[i].top_k for i in limited), dim=-1).values
    kth_largest = scores.new_full((scores.shape[0],), -torch.inf)
    kth_largest[limited] = top_FK.gather(-1, top_k_F[:, None] - 1)[:, 0]
    scores.masked_fill_(scores < kth_largest[:, None], -torch.inf)


def _nucleus_cut(
    weights_FV: Tensor,  # [F, V]  int64
    top_p_F: Tensor,  # [F]  fp32
    num_sorted: int,
) -> Tensor:  # [F]  int64
    """Return the smallest weight in each row's nucleus: the most likely tokens, until they reach top_p.

    Tokens equal to the smallest all stay, so the nucleus does not depend on how a sort orders equals.
    """
    vocab_size = weights_FV.shape[1]
    num_sorted = min(num_sorted, vocab_size)
    head_FK = weights_FV.topk(num_sorted, dim=-1).values
    reached_FK = head_FK.cumsum(-1)
    goal_F = top_p_F * weights_FV.sum(-1).to(torch.float32)
    # A token belongs to the nucleus if those before it have not reached the goal yet.
    inside_FK = (reached_FK - head_FK).to(torch.float32) < goal_F[:, None]
    inside_FK[:, 0] = True  # the most likely one stays, also where top_p is so small that fp32 has 0 for it
    cut_F = head_FK.gather(-1, inside_FK.sum(-1, keepdim=True) - 1)[:, 0]

    if num_sorted < vocab_size:
        unfinished = reached_FK[:, -1].to(torch.float32) < goal_F
        if unfinished.any():
            cut_F[unfinished] = _nucleus_cut(weights_FV[unfinished], top_p_F[unfinished], 16 * num_sorted)
    return cut_F
