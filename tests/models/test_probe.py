"""Probes equal figures computed from merged models in float64; the verdict flips where the model breaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from manylora.errors import AdapterMismatchError, RequestError
from manylora.lora.adapter import Adapter
from manylora.models.base_norms import base_norms, spectral_norm
from manylora.models.dense_attention import DenseAttention
from manylora.models.loading import build_model
from manylora.models.probe import MAX_ROWS, Change, ProbeResult, probe
from manylora.models.side_by_side import SideBySide
from manylora.models.tiny import tiny_adapter, tiny_config, tiny_model, tiny_weights
from manylora.models.verdict import KL, LOSS_INCREASE, Level, judge

CONFIG = tiny_config()
TEXTS = [[5, 9, 200, 31, 7], [80, 3], [44, 45, 46, 47, 48, 49, 50]]
POSITIONS = sum(map(len, TEXTS))

A = tiny_adapter(CONFIG, rank=4, seed=1, name="a")
B = tiny_adapter(CONFIG, rank=9, targets=("q_proj", "down_proj"), seed=2, dtype=torch.bfloat16, name="b")
MIXTURE = (0.5, -0.75)  # exact in float32, in which kernels hold weights


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG, dtype="float64")


def merged_logits(adapters: Sequence[Adapter], weights: Sequence[float]) -> Tensor:
    """[P, V] of a model to whose weights the deltas were added."""
    tensors = {name: tensor.double() for name, tensor in tiny_weights(CONFIG).items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        for site, pair in adapter.sites.items():
            # Kernels hold scaling in float32.
            exact = replace(pair, scaling=float(torch.tensor(pair.scaling)))
            tensors[f"{site}.weight"] += weight * exact.delta()
    attention = DenseAttention([len(text) for text in TEXTS], scale=CONFIG.attention_scale)
    tokens = torch.tensor([token for text in TEXTS for token in text])
    merged = build_model(CONFIG, tensors.items(), dtype="float64")
    logits: Tensor = merged(tokens, attention.positions, attention, None)
    return logits


def test_logits_side_by_side_equal_merged_models(model):
    mixtures = [(0.0, 0.0), MIXTURE, (1.0, 0.0), (0.0, 2.0)]
    got = SideBySide(model, [A, B]).logits(TEXTS, mixtures)
    assert got.shape == (4, POSITIONS, CONFIG.vocab_size)
    for weights, logits in zip(mixtures, got, strict=True):
        torch.testing.assert_close(logits, merged_logits([A, B], weights), rtol=0, atol=1e-9)
    assert (got[1] - got[0]).abs().max() > 0.5


def test_figures_equal_those_of_merged_models(model):
    result = probe(model, TEXTS, [A, B], MIXTURE)
    base, mixed = merged_logits([], []), merged_logits([A, B], MIXTURE)
    parts = [merged_logits([A], MIXTURE[:1]), merged_logits([B], MIXTURE[1:])]
    for got, logits in zip((result.mixture, *result.parts), (mixed, *parts), strict=True):
        p, q = base.softmax(-1), logits.softmax(-1)
        assert got.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
        assert got.kl > 0.01
        assert got.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        assert got.loss_increase == pytest.approx(loss(logits) - loss(base), rel=1e-6)
        assert got.perplexity_ratio == pytest.approx(
            math.exp(loss(logits)) / math.exp(loss(base)), rel=1e-6
        )
    assert result.base_loss == pytest.approx(loss(base))
    assert result.num_positions == POSITIONS
    whole, *single = (centred(logits - base) for logits in (mixed, *parts))
    additive = single[0] + single[1]
    want = float((whole - additive).norm() / additive.norm())
    assert want > 0.01
    assert result.non_additivity == pytest.approx(want, rel=1e-6)


def loss(logits: Tensor) -> float:
    """Of the texts' own next tokens, text by text."""
    split = logits.split([len(text) for text in TEXTS])
    losses = [
        torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(text[1:]), reduction="none")
        for rows, text in zip(split, TEXTS, strict=True)
    ]
    return float(torch.cat(losses).mean())


def centred(change: Tensor) -> Tensor:
    return change - change.mean(-1, keepdim=True)


def test_texts_in_one_batch_or_many_give_the_same(model, monkeypatch):
    assert POSITIONS * 4 < MAX_ROWS
    together = probe(model, TEXTS, [A, B], MIXTURE)
    monkeypatch.setattr("manylora.models.probe.MAX_ROWS", 1)
    alone = probe(model, TEXTS, [A, B], MIXTURE)
    assert alone.mixture.kl == pytest.approx(together.mixture.kl)
    assert alone.mixture.loss_increase == pytest.approx(together.mixture.loss_increase)
    assert alone.non_additivity == pytest.approx(together.non_additivity)


def test_the_base_beside_mixtures_is_the_base(model):
    result = probe(model, TEXTS, [A, B], (0.0, 0.0))
    assert result.mixture == Change(kl=0.0, top1_agreement=1.0, loss_increase=0.0)
    assert result.non_additivity is None
    assert judge(result, "ab").level is Level.FINE


def test_adapters_add_up_to_first_order(model):
    # The logits are smooth in the weights, so what does not add up falls with them.
    full, small = (probe(model, TEXTS, [A, B], (s, s)).non_additivity for s in (1.0, 2.0**-10))
    assert full is not None
    assert small is not None
    assert full > 0.1
    assert small < full / 100


def test_the_same_content_twice_is_one_adapter_of_both_weights(model):
    again = replace(A, name="again")
    twice = SideBySide(model, [A, again]).logits(TEXTS, [(0.5, 0.25)])
    once = SideBySide(model, [A]).logits(TEXTS, [(0.75,)])
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)


def test_a_single_adapter_is_its_own_part(model):
    result = probe(model, TEXTS, [A], [1.0])
    assert result.parts == (result.mixture,)
    assert result.non_additivity is None


def test_the_verdict_flips_as_an_adapter_grows():
    # A model that knows its text: the text is what it finds likeliest, so that losing it costs loss.
    model = tiny_model(CONFIG)
    text = [5]
    for _ in range(24):
        logits = SideBySide(model, [A]).logits([text], [[0.0]])
        text.append(int(logits[0, -1].argmax()))
    levels = [judge(probe(model, [text], [A], [weight]), "a").level for weight in (0.01, 0.4, 4.0)]
    assert levels[0] is Level.FINE
    assert levels[-1] is Level.BROKEN
    assert levels == sorted(levels)


def test_logits_that_overflow_are_broken():
    result = probe(tiny_model(CONFIG, dtype="float32"), TEXTS, [A], [3e38])
    assert result.mixture.loss_increase == result.mixture.kl == math.inf
    assert result.mixture.perplexity_ratio == math.inf
    assert judge(result, "a").level is Level.BROKEN


def result_of(kl: float, loss_increase: float) -> ProbeResult:
    change = Change(kl, 0.5, loss_increase)
    return ProbeResult(100, 3.0, change, (Change(0.1, 0.9, 0.0), change), 0.7)


@pytest.mark.parametrize("threshold", [LOSS_INCREASE, KL], ids=lambda t: t.figure)
def test_each_figure_alone_can_raise_the_level(threshold):
    below = {"kl": 0.0, "loss_increase": 0.0}
    for value, level in (
        (threshold.strained, Level.FINE),
        (threshold.strained + 1e-3, Level.STRAINED),
        (threshold.broken + 1e-3, Level.BROKEN),
    ):
        verdict = judge(result_of(**{**below, threshold.figure: value}), ["x", "y"])
        assert verdict.level is level


def test_the_evidence_names_figure_value_and_threshold():
    verdict = judge(result_of(kl=0.2, loss_increase=9.0), ["x", "y"])
    words = [*map(str, verdict.findings), *verdict.remarks]
    assert any("+9.000" in line and f"broken above {LOSS_INCREASE.broken:g}" in line for line in words)
    assert any("'y' moves the model most" in line for line in words)
    assert any("non-additivity of the logits is 0.70" in line for line in words)


def test_bad_probes_are_refused(model):
    for texts, adapters, weights in (
        ([], [A], [1.0]),
        ([[1]], [A], [1.0]),
        (TEXTS, [], []),
        (TEXTS, [A], []),
    ):
        with pytest.raises(
            RequestError, match="texts of at least 2 tokens, and adapters with a weight each"
        ):
            probe(model, texts, adapters, weights)
    with pytest.raises(AdapterMismatchError):
        probe(model, TEXTS, [tiny_adapter(tiny_config(hidden_size=32), name="small")], [1.0])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_base_norms_equal_those_of_the_weights(dtype):
    norms = base_norms(tiny_model(CONFIG, dtype=dtype))
    weights = tiny_weights(CONFIG)
    assert {f"{site}.weight" for site in norms} == {
        name for name in weights if name.endswith("proj.weight")
    }
    for site, norm in norms.items():
        weight = weights[f"{site}.weight"].double()
        assert norm.frobenius == pytest.approx(float(weight.norm()), rel=1e-2)
        # Subspace iteration comes from below, and slowly where the largest singular values are close together.
        assert norm.spectral == pytest.approx(float(torch.linalg.matrix_norm(weight, ord=2)), rel=3e-2)


def test_spectral_norm_of_a_known_spectrum():
    weight = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1])).double()
    assert spectral_norm(weight) == pytest.approx(3.0)
    assert spectral_norm(torch.zeros(3, 5)) == 0.0
