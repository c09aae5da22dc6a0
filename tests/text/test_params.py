"""SamplingParams: what is accepted, and what a refusal says."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from manylora.errors import RequestError
from manylora.text.params import GREEDY_BELOW, SamplingParams

REFUSED: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.5, True, "7"],
    "min_tokens": [-1, None, 0.0],
    "temperature": [-0.1, float("nan"), float("inf"), "hot", None, True, 10**400],
    "top_k": [-1, 2.0, None, False],
    "top_p": [0, 0.0, -0.5, 1.01, float("nan")],
    "min_p": [-0.01, 1.5, float("nan"), "0.1"],
    "seed": [-(2**63) - 1, 2**64, 1.0, "1", True],
    "repetition_penalty": [0, -1.0, 1e-30, float("inf"), None],
    "presence_penalty": [-2.1, 2.1, float("nan")],
    "frequency_penalty": [-2.1, 2.1, "a"],
    "logit_bias": [
        [1],
        "5",
        {"5": 1.0},
        {-1: 1.0},
        {True: 1.0},
        {5: "1"},
        {5: 100.1},
        {5: float("nan")},
        {5: None},
    ],
    "response_format": ["json_object", {}, {"type": "text"}, {"type": "json_schema", "json_schema": {}}],
    "stop": ["", ("a", ""), (1,), 3, ["a", None]],
    "stop_token_ids": [(-1,), (1.0,), "ab", 5, (True,)],
    "ignore_eos": [1, None, "yes"],
    "include_stop_str_in_output": [0, None],
    "skip_special_tokens": [1, None],
    "logprobs": [-1, 0.5, True],
    "n": [0, -3, None, 1.0],
}


def test_every_field_has_refusals():
    assert REFUSED.keys() == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_refusal_names_field_expected_and_got(name, value):
    with pytest.raises(RequestError) as refusal:
        SamplingParams.from_dict({name: value})
    message = str(refusal.value)
    assert f"parameter {name}: expected " in message
    assert ", got " in message


def test_bounds_themselves_are_accepted():
    SamplingParams(
        max_tokens=1, min_tokens=1, temperature=0, top_k=0, top_p=1, min_p=1, seed=-(2**63), logprobs=0,
        repetition_penalty=0.01, presence_penalty=-2, frequency_penalty=2, logit_bias={0: -100, 7: 100},
    )  # fmt: skip
    SamplingParams(seed=2**64 - 1, temperature=1000, repetition_penalty=100, presence_penalty=2, min_p=0)


def test_optional_fields_take_none():
    names = ["max_tokens", "seed", "logprobs", "stop", "stop_token_ids", "logit_bias", "response_format"]
    params = SamplingParams.from_dict(dict.fromkeys(names))
    assert (params.max_tokens, params.seed, params.logprobs) == (None, None, None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert (params.logit_bias, params.response_format) == ({}, None)


def test_min_tokens_above_max_tokens_is_refused():
    SamplingParams(min_tokens=4, max_tokens=4)
    with pytest.raises(RequestError, match="min_tokens: expected at most max_tokens, 4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_stop_takes_a_string_or_a_list():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3, 4]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)


def test_params_are_frozen_and_hashable():
    params = SamplingParams(stop=["a"], stop_token_ids=[1], logit_bias={1: 2.0})
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=(1,)))
    with pytest.raises(FrozenInstanceError):
        params.temperature = 0.5  # type: ignore[misc]


def test_from_dict_refuses_unknown_names_and_lists_the_known():
    assert SamplingParams.from_dict({"temperature": 0.5, "stop": ["x"]}) == SamplingParams(
        temperature=0.5, stop=("x",)
    )
    with pytest.raises(RequestError, match="'best_of', 'use_beam_search'") as refusal:
        SamplingParams.from_dict({"use_beam_search": True, "best_of": 2, "temperature": 1.0})
    for field in fields(SamplingParams):
        assert repr(field.name) in str(refusal.value)


def test_tiny_temperatures_are_greedy():
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=GREEDY_BELOW / 2).is_greedy
    assert not SamplingParams(temperature=GREEDY_BELOW).is_greedy


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_has_penalties(name):
    assert not SamplingParams().has_penalties
    assert SamplingParams.from_dict({name: 0.5}).has_penalties
