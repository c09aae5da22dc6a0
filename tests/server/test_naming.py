"""What a request's `model` and `lora` mean, whatever exists."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.server.api_errors import ApiError
from manylora.server.naming import weights_of

BASE = "org/base-1:8b"

names = st.text("abcé/-._ ", min_size=1).map(str.strip).filter(bool)
weights = st.floats(-8, 8).map(lambda weight: round(weight, 3))
terms = st.lists(st.tuples(names, weights), min_size=1, max_size=6)


def summed(pairs: list[tuple[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, weight in pairs:
        total[name] = total.get(name, 0.0) + weight
    return {name: weight for name, weight in total.items() if weight}


@pytest.mark.parametrize(
    ("model", "means"),
    [
        (BASE, {}),  # as it stands, though it holds a colon
        ("pirate", {"pirate": 1.0}),
        ("team/pirate:0.5", {"team/pirate": 0.5}),
        ("a:0.8+b:-0.5", {"a": 0.8, "b": -0.5}),
        ("a + b : 2", {"a": 1.0, "b ": 2.0}),
        ("a:1.5+a:1.5", {"a": 3.0}),
        ("a:1+a:-1+b", {"b": 1.0}),
        ("a:0", {}),
        ("a:1e1", {"a": 10.0}),
    ],
)
def test_model_names_a_mixture(model, means):
    assert dict(weights_of(model, None, base=BASE)) == means


def test_the_base_means_nothing_in_a_mixture():
    assert weights_of("tiny:7+a:2", None, base="tiny") == (("a", 2.0),)
    assert weights_of("tiny", [("tiny", 3.0), ("a", 2.0)], base="tiny") == (("a", 2.0),)
    assert weights_of("tiny", [], base="tiny") == ()


@settings(deadline=None)
@given(terms)
def test_both_ways_to_name_a_mixture_mean_the_same(pairs):
    spelt = "+".join(f"{name}:{weight}" for name, weight in pairs)
    by_model = weights_of(spelt, None, base=BASE)
    assert by_model == weights_of(BASE, pairs, base=BASE)
    assert dict(by_model) == pytest.approx(summed(pairs))
    assert [name for name, _ in by_model] == sorted({name for name, _ in by_model})


@pytest.mark.parametrize(
    ("model", "lora", "says", "param"),
    [
        ("", None, "without a name", "model"),
        ("a++b", None, "without a name", "model"),
        (":0.5", None, "without a name", "model"),
        ("a:x", None, "no number", "model"),
        ("a:1e+2", None, "no number", "model"),  # "+" joins terms; 1e2 has none
        ("a:nan", None, "finite", "model"),
        ("a:inf", None, "finite", "model"),
        ("a:1e308+a:1e308", None, "finite", "model"),
        (BASE, [("a", 1e308), ("a", 1e308)], "finite", "lora"),
        ("a", [("b", 1.0)], "one place", "lora"),
    ],
)
def test_what_makes_no_sense_is_refused(model, lora, says, param):
    with pytest.raises(ApiError) as refused:
        weights_of(model, lora, base=BASE)
    detail = refused.value.body.error
    assert refused.value.status_code == 400
    assert says in detail.message
    assert detail.param == param
