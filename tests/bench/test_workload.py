import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.bench.text.workload import Distribution, Trace, make_trace
from manylora.errors import ConfigError


def trace(distribution: str, *, num_requests=64, num_adapters=8, num_named=1, seed=0) -> Trace:
    return make_trace(
        num_requests=num_requests,
        prompt_tokens=5,
        output_tokens=3,
        vocab_size=50,
        num_adapters=num_adapters,
        distribution=Distribution.parse(distribution),
        num_named=num_named,
        seed=seed,
    )


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_power_is_the_formula_of_slora(alpha):
    num_adapters, num_draws = 20, 200_000
    drawn = (np.random.default_rng(0).power(alpha, num_draws) * num_adapters).astype(int)
    share = np.bincount(drawn, minlength=num_adapters) / num_draws
    p = Distribution.parse(f"power:{alpha}").probabilities(num_adapters)
    assert p.sum() == pytest.approx(1)
    assert np.all(np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / num_draws))


def test_power_one_is_uniform_and_less_is_concentrated():
    assert Distribution.parse("power:1").probabilities(8) == pytest.approx(1 / 8)
    assert Distribution.parse("uniform").probabilities(8) == pytest.approx(1 / 8)
    assert Distribution.parse("power:0.1").probabilities(8)[0] > 0.8


@pytest.mark.parametrize("distribution", ["uniform", "power:0.4"])
def test_traces_follow_the_probabilities(distribution):
    num_requests, num_adapters = 5000, 8
    named = [r.mixture[0][0] for r in trace(distribution, num_requests=num_requests).requests]
    share = np.bincount(named, minlength=num_adapters) / num_requests
    p = Distribution.parse(distribution).probabilities(num_adapters)
    assert np.all(np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / num_requests))


def test_distinct_names_every_adapter_before_any_again():
    named = [r.mixture[0][0] for r in trace("distinct", num_requests=20).requests]
    assert named == [i % 8 for i in range(20)]


def test_identical_names_one():
    assert trace("identical").adapters == [0]


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["uniform", "power:0.05", "power:0.7", "distinct", "identical"]),
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_mixtures_name_different_adapters_with_weights(distribution, num_named, more, seed):
    num_adapters = num_named + more
    made = trace(distribution, num_adapters=num_adapters, num_named=num_named, num_requests=9, seed=seed)
    for request in made.requests:
        adapters = [adapter for adapter, _ in request.mixture]
        assert len(set(adapters)) == num_named
        assert set(adapters) <= set(range(num_adapters))
        weights = [weight for _, weight in request.mixture]
        assert weights == [1.0] if num_named == 1 else all(0.25 <= weight <= 1 for weight in weights)


def test_a_seed_fixes_the_trace_and_the_choice_of_adapters_leaves_prompts_alone():
    assert trace("uniform", seed=1) == trace("uniform", seed=1)
    assert trace("uniform", seed=1) != trace("uniform", seed=2)
    prompts = [r.prompt for r in trace("uniform").requests]
    assert prompts == [r.prompt for r in trace("power:0.3", num_adapters=3, num_named=2).requests]
    assert len(set(prompts)) == len(prompts)


def test_cut_and_base():
    made = trace("uniform")
    assert made.num_output_tokens == 64 * 3
    short = made.cut(max_requests=4, max_output_tokens=2)
    assert short.requests == made.requests[:4]
    assert short.output_tokens == 2
    assert made.cut() == made
    assert made.adapters
    assert made.on_base().adapters == []
    assert [r.prompt for r in made.on_base().requests] == [r.prompt for r in made.requests]


@pytest.mark.parametrize(
    "text", ["zipf", "power", "power:", "power:0", "power:2", "power:x", "uniform:1", ""]
)
def test_unknown_distributions_are_refused_by_name(text):
    with pytest.raises(ConfigError, match=text or "unknown"):
        Distribution.parse(text)


def test_a_mixture_of_more_adapters_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="mixtures of 9 cannot be drawn from 8"):
        trace("uniform", num_named=9)


@pytest.mark.parametrize("text", ["uniform", "power:0.3", "distinct", "identical"])
def test_a_distribution_prints_as_it_is_read(text):
    assert str(Distribution.parse(text)) == text
