"""The trace is S-LoRA's, to the bit where it is drawn as theirs is, and by its laws where not."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from manylora.bench.serve.config import ServeBenchConfig
from manylora.bench.serve.workload import Workload, draw_many, draw_requests, without_tenant
from manylora.errors import ConfigError


def workload(**settings) -> Workload:
    values: dict[str, Any] = dict(
        rate=5.0,
        duration_s=60.0,
        cv=1.0,
        alpha=1.0,
        num_adapters=200,
        prompt_range=(8, 64),
        output_range=(4, 32),
        vocab_size=1000,
        seed=42,
    )
    return Workload(**(values | settings))


@pytest.mark.parametrize(("alpha", "cv"), [(1.0, 1.0), (0.1, 4.0)])
def test_draws_are_those_of_slora(alpha, cv):
    drawn = draw_requests(workload(alpha=alpha, cv=cv))
    state = np.random.get_state()
    np.random.seed(42)  # as theirs does; here only to compare with
    number = (np.random.power(alpha, 300) * 200).astype(int)
    prompt_lens, output_lens = np.random.randint(8, 64, 300), np.random.randint(4, 32, 300)
    at_s = np.cumsum(np.random.gamma(1 / (cv * cv), cv * cv / 5.0, 300))
    np.random.set_state(state)
    assert [request.adapter for request in drawn] == number.tolist()
    assert [len(request.prompt) for request in drawn] == prompt_lens.tolist()
    assert [request.output_tokens for request in drawn] == output_lens.tolist()
    assert [request.at_s for request in drawn] == pytest.approx(at_s)


def test_alpha_one_is_uniform_and_less_is_skewed_to_the_first():
    uniform = Counter(request.adapter for request in draw_many(workload(num_adapters=10), 5000))
    skewed = Counter(request.adapter for request in draw_many(workload(num_adapters=10, alpha=0.1), 5000))
    assert min(uniform[number] for number in range(10)) > 400
    assert skewed[0] > 3500


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_variation(cv):
    at_s = np.array([request.at_s for request in draw_requests(workload(cv=cv, duration_s=4000))])
    gaps = np.diff(at_s)
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_prompts_are_random_and_change_with_nothing_else():
    ours, burstier = draw_requests(workload()), draw_requests(workload(cv=3.0, alpha=0.5))
    assert len({request.prompt[:4] for request in ours}) > 295
    assert max(token for request in ours for token in request.prompt) > 900
    assert ours == draw_requests(workload())
    assert ours != draw_requests(workload(seed=43))
    assert ours[0].prompt[:4] == burstier[0].prompt[:4]


def test_zero_adapters_is_the_base():
    assert {request.adapter for request in draw_requests(workload(num_adapters=0))} == {None}


def test_the_hog_sends_so_many_times_as_much_and_the_others_go_on_without_it():
    drawn = draw_requests(workload(duration_s=400), num_tenants=5, hog=10.0)
    counts = np.bincount([request.tenant for request in drawn])
    assert counts.sum() == pytest.approx(2000, abs=5)
    assert counts[0] == pytest.approx(10 * counts[1], rel=0.01)
    assert [request.at_s for request in drawn] == sorted(request.at_s for request in drawn)
    others = without_tenant(drawn, 0)
    assert len(others) == counts[1:].sum()
    assert set(others) <= set(drawn)
    # No tenant says what another says.
    assert len({request.prompt[:4] for request in others}) > 0.95 * len(others)


def test_the_closed_loop_has_as_many_as_it_wants():
    assert len(draw_many(workload(rate=0.001), 77)) == 77


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(rate=(1.0,), load=(1.0,)), "give one of them"),
        (dict(rows=(0, 5), tenants=2), "curve"),
        (dict(rows=(0, 5), load=(0.5, 1.0)), "curve"),
        (dict(rows=(0, 5), rate=(0.5, 1.0)), "curve"),
        (dict(api_key=("sk",)), "gets its own"),
        (dict(url="http://x", policies=("fcfs",)), "runs as it is; leave out policies"),
        (dict(url="http://x", rank=(4,), serve_options="--debug"), "leave out rank, serve_options"),
        (dict(url="http://x", tenants=3, api_key=("a", "b")), "give one api_key or 3"),
        (dict(input_range=(5, 5)), "input_range must be two numbers"),
        (dict(output_range=(1, 2, 3)), "output_range must be two numbers"),
        (dict(load=(0.0,)), "above 0"),
        (dict(rank=()), "rank"),
        (dict(hog=0.5), "hog"),
        (dict(tenants=0), "tenants must be at least 1"),
        (dict(cv=0.0), "cv must be above 0"),
    ],
)
def test_settings_that_contradict_each_other(settings, says):
    with pytest.raises(ConfigError, match=says):
        ServeBenchConfig(model="m", **settings)


def test_what_a_config_means():
    assert ServeBenchConfig(model="m").loads == (0.5, 1.0, 2.0)
    assert ServeBenchConfig(model="m", rate=(2.0,)).loads == ()
    curve = ServeBenchConfig(model="m", rows=(0, 10, 100), serve_options="--pool-bytes 100 --debug")
    assert (curve.kind, curve.loads, curve.num_adapters) == ("adapters", (1.0,), 100)
    assert curve.options == ["--pool-bytes", "100", "--debug"]
    assert ServeBenchConfig(model="m", tenants=5).kind == "tenants"
