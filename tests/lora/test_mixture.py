import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import RequestError
from manylora.lora.mixture import BASE, MAX_WEIGHT, Mixture

NAMES = st.text(st.characters(blacklist_characters="+:", blacklist_categories=["Cs"]), min_size=1).filter(
    lambda name: name.strip() == name and name
)
WEIGHTS = st.floats(-MAX_WEIGHT, MAX_WEIGHT)


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        (None, ()),
        ({}, ()),
        ("alice", (("alice", 1.0),)),
        ("alice:0.8", (("alice", 0.8),)),
        ("team/bob.v2:-0.5", (("team/bob.v2", -0.5),)),
        (" bob:0.5 + alice:1.0 ", (("alice", 1.0), ("bob", 0.5))),
        ("alice:0+bob", (("bob", 1.0),)),
        ({"bob": 1, "alice": 2}, (("alice", 2.0), ("bob", 1.0))),
        ([("bob", 1), ("alice", 0.0)], (("bob", 1.0),)),
        (Mixture((("bob", 1.0),)), (("bob", 1.0),)),
    ],
)
def test_parse(spec, weights):
    assert Mixture.parse(spec).weights == weights


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "not empty"),
        ("alice+", "not empty"),
        (":0.5", "not empty"),
        ("alice:", "is no number"),
        ("alice:high", "is no number"),
        ("alice:nan", "finite"),
        ("a:b:0.5", "holds '\\+' or ':'"),
        ("alice+alice:0.5", "twice"),
        ("alice:0+alice:0", "twice"),
        ({"alice": math.inf}, "finite"),
        ({"alice": True}, "finite"),
        ({"alice": "0.5"}, "finite"),
        ({"alice": 10**400}, "finite"),
        ({"alice": None}, "finite"),
        ({3: 1.0}, "expected a name"),
        ({"a+b": 1.0}, "holds"),
        ([("alice",)], "expected a mixture"),
        (7, "expected a mixture"),
    ],
)
def test_what_is_no_mixture_is_refused_by_name(spec, says):
    with pytest.raises(RequestError, match=says):
        Mixture.parse(spec)


def test_base_is_the_mixture_of_none():
    assert Mixture.parse(None) == BASE == Mixture.parse({"alice": 0.0})
    assert not BASE
    assert Mixture.parse("alice")
    assert str(BASE) == "base"
    assert str(Mixture.parse({"b": 0.5, "a": 1.0})) == "a:1+b:0.5"


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(NAMES, WEIGHTS, min_size=1, max_size=4))
def test_printed_mixture_parses_to_itself_in_any_order(weights):
    mixture = Mixture.parse(weights)
    assert Mixture.parse(list(weights.items())[::-1]) == mixture
    assert hash(Mixture.parse(dict(reversed(weights.items())))) == hash(mixture)
    assert mixture.names == tuple(sorted(name for name, weight in weights.items() if weight != 0.0))
    if mixture:
        assert Mixture.parse(str(mixture)) == mixture
