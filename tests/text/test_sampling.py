"""TokenSampler: the filtered distribution against transformers, the draw against it, and the laws of
batching."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from manylora.text.draws import draw, random_bits, sample_seed
from manylora.text.filters import token_weights
from manylora.text.params import SamplingParams
from manylora.text.penalties import apply_penalties
from manylora.text.sampling import SampledToken, SamplingRow, TokenSampler

GREEDY = SamplingParams(temperature=0)


def make_logits(num_rows: int, vocab_size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def make_row(params=None, *, seed=0, prompt=(), output=(), banned=()) -> SamplingRow:
    return SamplingRow(params or SamplingParams(), seed, prompt, output, banned)


def probabilities(weights: torch.Tensor) -> torch.Tensor:
    return (weights.double() / weights.sum(-1, keepdim=True).double()).float()


# The filtered distribution.


@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([2, 17, 257, 1000]),
    spread=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    temperature=st.floats(0.05, 5.0),
    top_k=st.one_of(st.just(0), st.integers(1, 1200)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    num_sorted=st.sampled_from([1, 4, 256]),
)
@settings(deadline=None, max_examples=150)
def test_filtered_distribution_equals_transformers(
    seed, vocab_size, spread, temperature, top_k, top_p, min_p, num_sorted
):
    logits = make_logits(1, vocab_size, seed, spread)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = probabilities(token_weights(logits.clone(), [params], num_sorted))

    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    no_ids = torch.zeros(1, 0, dtype=torch.long)
    scores = logits.clone()
    for warper in warpers:
        scores = warper(no_ids, scores)
    want = scores.softmax(-1)

    # A token less than 2^-50 times as likely as the first has no weight; nor has it any effect on the rest.
    unfiltered = (logits / temperature).softmax(-1)[0]
    visible = unfiltered > 1e-12 * unfiltered.max()
    assert (want[0, ~visible] < 1e-12).all()
    # Both round to fp32 somewhere, so a token at the edge of top_p or min_p may fall on either side; then
    # the others must agree once it is left out.
    differing = (visible & ((got[0] > 0) != (want[0] > 0))).nonzero()[:, 0].tolist()
    assert len(differing) <= 1
    assert all(is_at_an_edge(token, unfiltered, params) for token in differing)
    got[0, differing] = want[0, differing] = 0
    torch.testing.assert_close(got / got.sum(), want / want.sum(), atol=2e-6, rtol=2e-5)


def is_at_an_edge(token: int, unfiltered: torch.Tensor, params: SamplingParams) -> bool:
    ordered = unfiltered.double().sort(descending=True).values
    if params.top_k:
        ordered = ordered[: params.top_k]
    before = float(ordered[ordered > unfiltered[token]].sum() / ordered.sum())
    ratio = float(unfiltered[token] / ordered[0])
    return abs(before - params.top_p) < 1e-5 or abs(ratio - params.min_p) < 1e-5


def test_filters_cut_by_hand():
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    cases = {
        "none": (SamplingParams(), [0.4, 0.3, 0.15, 0.1, 0.05]),
        "top_k": (SamplingParams(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        "top_p keeps the token that crosses it": (SamplingParams(top_p=0.6), [4 / 7, 3 / 7, 0, 0, 0]),
        "top_p keeps the first always": (SamplingParams(top_p=0.01), [1, 0, 0, 0, 0]),
        "min_p": (SamplingParams(min_p=0.3), [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        "min_p 1": (SamplingParams(min_p=1.0), [1, 0, 0, 0, 0]),
        # The two first are 0.7 of all, but 0.82 of the three that top_k left.
        "top_p counts what top_k left": (SamplingParams(top_k=3, top_p=0.8), [4 / 7, 3 / 7, 0, 0, 0]),
        "temperature 0.5 squares": (
            SamplingParams(temperature=0.5),
            [p * p / 0.285 for p in (0.4, 0.3, 0.15, 0.1, 0.05)],
        ),
    }
    scores = logits.repeat(len(cases), 1)
    got = probabilities(token_weights(scores, [params for params, _ in cases.values()]))
    for row, (name, (_, want)) in zip(got, cases.items(), strict=True):
        assert row.tolist() == pytest.approx(want, abs=1e-6), name


@pytest.mark.parametrize("params", [SamplingParams(top_k=2), SamplingParams(top_p=0.5)])
def test_tokens_equal_to_the_last_kept_all_stay(params):
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, -3.0]])
    kept = token_weights(logits, [params])[0] > 0
    assert kept.tolist() == [True, True, True, True, False]


@given(seed=st.integers(0, 2**31), top_p=st.floats(0.01, 0.99), top_k=st.integers(0, 300))
@settings(deadline=None, max_examples=40)
def test_nucleus_does_not_depend_on_how_many_tokens_are_sorted_first(seed, top_p, top_k):
    # Rounded logits have many equals, where a sort's order could show.
    logits = (make_logits(3, 300, seed) * 2).round() / 2
    params = [SamplingParams(top_p=top_p, top_k=top_k)] * 3
    want = token_weights(logits.clone(), params, num_sorted=300)
    assert ((want > 0).sum(-1) < 300).all()
    for num_sorted in (1, 8, 299):
        assert torch.equal(token_weights(logits.clone(), params, num_sorted), want)


def test_extreme_temperatures_stay_finite():
    logits = make_logits(2, 100, spread=1e4)
    params = [SamplingParams(temperature=1e-5), SamplingParams(temperature=1000)]
    weights = token_weights(logits.clone(), params)
    assert (weights >= 0).all()
    assert weights[0].count_nonzero() == 1
    assert weights[0].argmax() == logits[0].argmax()
    assert weights[1].count_nonzero() > 10


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 2**18])
def test_sum_of_weights_fits_an_int64(vocab_size):
    total = token_weights(torch.zeros(1, vocab_size), [SamplingParams()]).sum().item()
    assert 2**59 < total < 2**63


# Penalties.


@given(
    seed=st.integers(0, 2**31),
    penalty=st.floats(0.1, 3.0),
    prompt=st.lists(st.integers(0, 49), max_size=20),
    output=st.lists(st.integers(0, 49), max_size=20),
)
@settings(deadline=None, max_examples=60)
def test_repetition_penalty_equals_transformers(seed, penalty, prompt, output):
    logits = make_logits(1, 50, seed)
    got = logits.clone()
    row = make_row(SamplingParams(repetition_penalty=penalty), prompt=prompt, output=output)
    apply_penalties(got, [row])
    ids = torch.tensor([prompt + output], dtype=torch.long)
    want = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()) if ids.numel() else logits
    assert torch.equal(got, want)


def test_presence_and_frequency_count_the_output_only():
    scores = torch.zeros(2, 5)
    rows = [
        make_row(
            SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt=[0, 4], output=[1, 2, 2, 2]
        ),
        make_row(SamplingParams(frequency_penalty=-1.0), prompt=[0], output=[3, 3]),
    ]
    apply_penalties(scores, rows)
    assert scores.tolist() == [[0, -0.75, -1.25, 0, 0], [0, 0, 0, 2.0, 0]]


def test_repetition_comes_before_frequency():
    scores = torch.tensor([[4.0, 0.0]])
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    apply_penalties(scores, [make_row(params, output=[0])])
    assert scores.tolist() == [[1.0, 0.0]]  # 4 / 2 - 1, not (4 - 1) / 2


def test_penalties_change_only_their_row():
    logits = make_logits(3, 20)
    logits[:, 7] = logits.amax() + 0.25
    penalised = SamplingParams(temperature=0, presence_penalty=2)
    rows = [make_row(GREEDY), make_row(penalised, output=[7]), make_row(GREEDY)]
    before = logits.clone()
    ids = [token.token_id for token in TokenSampler().sample(logits, rows)]
    assert ids[0] == ids[2] == 7
    assert ids[1] != 7
    assert torch.equal(logits, before)


def test_biases_are_added_after_penalties_and_change_their_row_only():
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    rows = [
        make_row(SamplingParams(logit_bias={0: 5.0, 2: -1.5}, repetition_penalty=2.0), prompt=[0]),
        make_row(),
        make_row(SamplingParams(logit_bias={1: -100.0})),
    ]
    scores = logits.clone()
    apply_penalties(scores, rows)
    assert scores.tolist() == [[5.5, 2.0, 1.5], [1.0, 2.0, 3.0], [1.0, -98.0, 3.0]]


def test_biases_decide_greedy_and_random_rows():
    logits = make_logits(40, 50)
    for temperature in (0.0, 1.0):
        forced = make_row(SamplingParams(temperature=temperature, logit_bias={7: 100.0}))
        barred = make_row(SamplingParams(temperature=temperature, logit_bias={7: -100.0}))
        assert {t.token_id for t in TokenSampler().sample(logits, [forced] * 40)} == {7}
        assert 7 not in {t.token_id for t in TokenSampler().sample(logits, [barred] * 40)}
    free = [make_row(SamplingParams(temperature=50.0), seed=seed) for seed in range(40)]
    assert 1 < len({t.token_id for t in TokenSampler().sample(logits, free)})


def test_banned_tokens_are_never_chosen():
    logits = make_logits(1, 10)
    best = int(logits.argmax())
    assert TokenSampler().sample(logits, [make_row(GREEDY)])[0].token_id == best
    assert TokenSampler().sample(logits, [make_row(GREEDY, banned=[best])])[0].token_id != best
    all_but_one = [token for token in range(10) if token != 3]
    for seed in range(20):
        assert TokenSampler().sample(logits, [make_row(seed=seed, banned=all_but_one)])[0].token_id == 3


# Greedy rows.


@given(seed=st.integers(0, 2**31), greedy=st.lists(st.booleans(), max_size=6))
@settings(deadline=None, max_examples=40)
def test_greedy_rows_are_the_argmax_of_raw_logits(seed, greedy):
    logits = make_logits(len(greedy), 97, seed)
    logits[:, 10:] = logits[:, 10:].round()  # equals, of which argmax takes one
    rows = [
        make_row(
            SamplingParams(temperature=0 if is_greedy else 1.5, logprobs=1 if i == 2 else None), seed=seed
        )
        for i, is_greedy in enumerate(greedy)
    ]
    tokens = TokenSampler().sample(logits, rows)
    for token, row, is_greedy in zip(tokens, logits, greedy, strict=True):
        if is_greedy:
            assert token.token_id == row.argmax().item()


def test_top_k_1_is_greedy():
    logits = make_logits(50, 1000)
    tokens = TokenSampler().sample(logits, [make_row(SamplingParams(top_k=1), seed=i) for i in range(50)])
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


# The draw.


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(min_p=0.05),
    ],
    ids=["plain", "top_k", "top_p", "min_p"],
)
def test_draws_follow_the_distribution(params):
    num_draws = 20_000
    logits = make_logits(1, 12, seed=5, spread=1.5)
    weights = token_weights(logits.clone(), [params])
    expected = probabilities(weights)[0].double().numpy() * num_draws
    repeated = weights.expand(num_draws, -1)
    counts = np.bincount(draw(repeated, [random_bits(7, i) for i in range(num_draws)]), minlength=12)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    assert possible.sum() > 3
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # Mean is the degrees of freedom, deviation sqrt(2 df): five deviations.
    freedom = possible.sum() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_positions_and_samples_and_seeds_draw_independently():
    def bits(numbers: list[int]) -> np.ndarray:
        return np.unpackbits(np.array(numbers, dtype=np.uint64).view(np.uint8))

    by_position = [random_bits(1, i) for i in range(2000)]
    by_seed = [random_bits(i, 1) for i in range(2000)]
    by_sample = [sample_seed(1, i) for i in range(1, 2001)]
    assert len({*by_position, *by_seed, *by_sample}) >= 5999  # (1, 1) is in two of them
    for numbers in (by_position, by_seed, by_sample):
        stream = bits(numbers).astype(float) * 2 - 1
        assert abs(stream.mean()) < 5 / math.sqrt(stream.size)
        assert abs((stream[:-64] * stream[64:]).mean()) < 5 / math.sqrt(stream.size)


def test_random_bits_are_the_same_on_every_machine():
    assert random_bits(0, 0) == 0xCDCBCF7C6291A417
    assert random_bits(2**64 - 1, 12345) == 0x779A14FDCCD89B78


def test_sample_seed():
    assert sample_seed(42) == 42
    assert sample_seed(-1) == 2**64 - 1
    assert sample_seed(42, 1) != sample_seed(42, 2)
    assert sample_seed(None) != sample_seed(None)


def test_zero_weights_are_never_drawn():
    weights = torch.tensor([[0, 0, 5, 0, 3, 0]])
    for extreme in (0, 1, 2**64 - 1, 2**63):
        assert draw(weights, [extreme])[0] in (2, 4)
    assert draw(weights, [0]) == [2]
    assert draw(weights, [2**64 - 1]) == [4]


# Laws of batching.

VARIED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.95),
    SamplingParams(temperature=1.2, top_k=40, min_p=0.02),
    SamplingParams(top_p=0.3, repetition_penalty=1.3, logprobs=3),
    SamplingParams(temperature=1.7, presence_penalty=0.5, frequency_penalty=0.2),
]


@pytest.mark.parametrize("vocab_size", [257, 49_153])
def test_a_row_gets_the_same_token_in_any_batch(vocab_size):
    num_rows = 24
    logits = make_logits(num_rows, vocab_size, spread=2.0)
    rows = [
        make_row(VARIED[i % len(VARIED)], seed=i, prompt=range(i), output=range(2 * i, 3 * i))
        for i in range(num_rows)
    ]
    sampler = TokenSampler()
    together = sampler.sample(logits, rows)
    assert len({token.token_id for token in together}) > num_rows // 2
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1)).tolist()
    for start in range(0, num_rows, 5):
        some = order[start : start + 5]
        assert sampler.sample(logits[some], [rows[i] for i in some]) == [together[i] for i in some]
    for i in range(num_rows):
        assert sampler.sample(logits[i : i + 1], [rows[i]]) == [together[i]]


@pytest.mark.parametrize("vocab_size", [257, 49_153])
def test_weights_have_the_same_bits_wherever_a_row_stands(vocab_size):
    # Tokens would hide a last bit: compare what they are drawn from.
    logits = make_logits(9, vocab_size)
    params = [VARIED[1 + i % 5] for i in range(9)]
    together = token_weights(logits.clone(), params)
    for i in range(9):
        assert torch.equal(token_weights(logits[i : i + 1].clone(), [params[i]])[0], together[i])


def test_the_draw_depends_on_seed_and_position_only():
    logits = torch.zeros(1, 50_000)
    sampler = TokenSampler()

    def token(seed: int, prompt: list[int], output: list[int]) -> int | None:
        return sampler.sample(logits, [make_row(seed=seed, prompt=prompt, output=output)])[0].token_id

    assert token(3, [1, 2], [5, 6]) == token(3, [9], [7, 8])
    assert token(3, [1, 2], [5, 6]) != token(3, [1, 2], [5, 6, 7])
    assert token(3, [1, 2], [5, 6]) != token(4, [1, 2], [5, 6])


# Log-probabilities, and rows that cannot be sampled.


def test_logprobs_are_of_the_raw_logits():
    logits = make_logits(3, 30)
    params = SamplingParams(temperature=0.3, top_k=2, presence_penalty=1.0, logprobs=4)
    greedy = SamplingParams(temperature=0, logprobs=0)
    rows = [make_row(params, output=[1, 2]), make_row(), make_row(greedy)]
    tokens = TokenSampler().sample(logits, rows)
    want = logits.double().log_softmax(-1)
    first, none, last = (token.logprobs for token in tokens)
    assert none is None
    assert first is not None
    assert last is not None
    assert first.sampled == pytest.approx(want[0, tokens[0].token_id].item(), abs=1e-5)
    assert [token_id for token_id, _ in first.top] == want[0].topk(4).indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(want[0].topk(4).values.tolist(), abs=1e-5)
    assert last.top == ()
    assert last.sampled == pytest.approx(want[2].max().item(), abs=1e-5)


def test_more_logprobs_than_tokens_gives_all_tokens():
    logprobs = TokenSampler().sample(make_logits(1, 5), [make_row(SamplingParams(logprobs=20))])[0].logprobs
    assert logprobs is not None
    assert sorted(token_id for token_id, _ in logprobs.top) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_gives_no_token_and_harms_no_other(value):
    logits = make_logits(6, 40)
    rows = [make_row(VARIED[i], seed=i, output=[3]) for i in range(6)]
    want = TokenSampler().sample(logits, rows)
    for broken in range(6):
        poisoned = logits.clone()
        poisoned[broken, 13] = value
        got = TokenSampler().sample(poisoned, rows)
        assert got[broken] == SampledToken(None, is_sound=False)
        assert got[:broken] + got[broken + 1 :] == want[:broken] + want[broken + 1 :]


def test_a_ban_does_not_hide_a_broken_row():
    logits = make_logits(1, 40)
    logits[0, 13] = math.nan
    assert TokenSampler().sample(logits, [make_row(GREEDY, banned=[13])]) == [
        SampledToken(None, is_sound=False)
    ]


def test_a_row_with_every_token_banned_gives_none():
    tokens = TokenSampler().sample(make_logits(2, 4), [make_row(banned=range(4)), make_row(GREEDY)])
    assert tokens[0].token_id is None
    assert tokens[1].token_id is not None


def test_no_rows():
    assert TokenSampler().sample(torch.zeros(0, 10), []) == []


def test_sampling_many_rows_reaches_many_tokens():
    logits = torch.zeros(200, 50)
    tokens = TokenSampler().sample(logits, [make_row(seed=i) for i in range(200)])
    assert len(Counter(token.token_id for token in tokens)) > 40
