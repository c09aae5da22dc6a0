"""Answers in a given form: what comes is what the schema says, in any company, and a bad schema is refused by place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from manylora.errors import ConfigError, RequestError
from manylora.models.tiny import tiny_tokenizer
from manylora.text import Completion, Engine, SamplingParams
from manylora.text.guide import MAX_COMPILED, Guide, Guides
from tests.text.engines import CONFIG, engine

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 100, "maximum": 999},
        "kind": {"enum": ["debit", "credit"]},
        "paid": {"type": "boolean"},
    },
    "required": ["sum", "kind", "paid"],
    "additionalProperties": False,
}
NO_BLANKS = {ord(blank): -100.0 for blank in " \n\t\r"}
"""A model that knows nothing takes every blank that it may."""


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def params(schema: dict[str, Any] | None, **changes: Any) -> SamplingParams:
    settings: dict[str, Any] = {"max_tokens": 80, "seed": 1, "logit_bias": NO_BLANKS}
    return SamplingParams(
        **settings | {"response_format": None if schema is None else form(schema)} | changes
    )


def is_bill(text: str) -> bool:
    try:
        bill = json.loads(text)
    except ValueError:
        return False
    return (
        bill.keys() == {"sum", "kind", "paid"}
        and 100 <= bill["sum"] <= 999
        and bill["kind"] in ("debit", "credit")
        and isinstance(bill["paid"], bool)
    )


def ask(served: Engine, one: SamplingParams, mixture: str | None = None) -> Completion:
    (completion,) = served.generate([[1, 2, 3]], one, [mixture])
    return completion


def test_the_answer_has_the_form_that_was_asked_for() -> None:
    mixtures = [None, "a", {"b": 0.5, "c": 1.0}] * 2
    with engine() as served:
        free = served.generate([[1, 2, 3]] * 6, params(None), mixtures)
        guided = served.generate([[1, 2, 3]] * 6, [params(SCHEMA, seed=i) for i in range(6)], mixtures)
        greedy = ask(served, params(SCHEMA, temperature=0))
    assert not any(is_bill(completion.text) for completion in free)
    assert [is_bill(completion.text) for completion in guided] == [True] * 6
    assert len({completion.text for completion in guided}) > 2
    assert [completion.finish_reason for completion in guided] == ["stop"] * 6
    assert is_bill(greedy.text)


def test_any_object_is_an_object() -> None:
    wanted = params(None, response_format={"type": "json_object"}, logit_bias=NO_BLANKS | {ord("}"): 100.0})
    with engine() as served:
        assert isinstance(json.loads(ask(served, wanted).text), dict)


def test_samples_in_company_and_preempted_stay_in_form_and_are_the_same_as_alone() -> None:
    wanted = params(SCHEMA, n=3, seed=5)
    prompts, mixtures = [[1, 2, 3], [9] * 20, [4, 5]], ["d", None, "b"]
    with engine() as served:
        alone = [
            [c.token_ids for c in served.generate([p], wanted, [m])]
            for p, m in zip(prompts, mixtures, strict=True)
        ]
    with engine(num_pages=40) as served:
        together = served.generate(prompts, wanted, mixtures)
        assert served.stats().num_preemptions > 0
    assert [c.token_ids for c in together] == [tokens for samples in alone for tokens in samples]
    assert all(is_bill(c.text) for c in together)
    assert len({c.text for c in together}) > 3


def test_it_ends_with_the_form_whatever_else_would_let_it_go_on() -> None:
    with engine() as served:
        for one in (params(SCHEMA, ignore_eos=True), params(SCHEMA, min_tokens=79)):
            completion = ask(served, one)
            assert completion.finish_reason == "stop"
            assert is_bill(completion.text)


def test_min_tokens_and_stop_strings_hold_inside_the_form() -> None:
    digits = {"type": "integer", "minimum": 0}
    end = CONFIG.eos_token_ids[0]
    hurry = NO_BLANKS | {end: 100.0}
    with engine() as served:
        short = ask(served, params(digits, logit_bias=hurry))
        long = ask(served, params(digits, logit_bias=hurry, min_tokens=6))
        cut = ask(served, params(SCHEMA, stop='"kind"'))
    assert len(short.text) < len(long.text) == 6
    assert int(long.text) > 0
    assert cut.text.startswith('{"sum":')
    assert cut.text.endswith(",")


def test_with_the_last_token_allowed_the_form_may_be_complete() -> None:
    with engine() as served:
        whole = ask(served, params(SCHEMA))
        exact = ask(served, params(SCHEMA, max_tokens=len(whole.token_ids)))
        cut = ask(served, params(SCHEMA, max_tokens=len(whole.token_ids) - 1))
    assert (exact.text, exact.finish_reason) == (whole.text, "stop")
    assert (cut.text, cut.finish_reason) == (whole.text[:-1], "length")


def test_a_form_that_leaves_no_token_fails_alone_and_says_so() -> None:
    """Until min_tokens the stop token is banned, and the form allows no other."""
    with engine() as served:
        bad, good = served.generate(
            [[1], [1]],
            [params({"const": 7}, stop_token_ids=[ord("7")], min_tokens=3), params({"const": 7})],
        )
    assert isinstance(bad.error, RequestError)
    assert "no token is left" in str(bad.error)
    assert good.text == "7"


BAD = {
    "Invalid type: strin": ({"type": "strin"}, ""),
    "Invalid type: nil": ({"properties": {"a": {"items": {"type": "nil"}}}}, " at '/properties/a/items'"),
    "look-ahead": ({"prefixItems": [{}, {"type": "string", "pattern": "(?=x)"}]}, " at '/prefixItems/1'"),
    "Unimplemented keys": ({"type": "array", "uniqueItems": True}, ""),
    "'/nope' does not exist": ({"$ref": "#/nope"}, ""),
    "greater than maximum": ({"type": "integer", "minimum": 5, "maximum": 3}, ""),
    "recursion": (json.loads('{"items":' * 300 + "{}" + "}" * 300), None),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_schema_is_refused_with_its_place(fault: str) -> None:
    schema, place = BAD[fault]
    guides = Guides(tiny_tokenizer(), vocab_size=CONFIG.vocab_size, eos_token_ids=CONFIG.eos_token_ids)
    with pytest.raises(RequestError) as caught:
        guides.start(form(schema))
    assert fault in str(caught.value)
    assert place is None or f"the JSON schema{place}:" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "given",
    [
        {"type": "text"},
        {"type": "json_object", "strict": True},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": [1]}},
        {"type": "json_schema", "json_schema": {"schema": {}, "name": "x"}},
        "json_object",
    ],
)
def test_other_formats_are_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="response_format: expected"):
        SamplingParams(response_format=given)


def test_without_a_tokenizer_there_is_no_form() -> None:
    guides = Guides(None, vocab_size=CONFIG.vocab_size, eos_token_ids=())
    with pytest.raises(RequestError, match="needs a tokenizer"):
        guides.start(form(SCHEMA))


def test_without_llguidance_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    guides = Guides(tiny_tokenizer(), vocab_size=CONFIG.vocab_size, eos_token_ids=())
    with pytest.raises(ConfigError, match=r"manylora\[server\]"):
        guides.start(form(SCHEMA))


def test_a_schema_is_compiled_once_and_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    guides = Guides(tiny_tokenizer(), vocab_size=CONFIG.vocab_size, eos_token_ids=CONFIG.eos_token_ids)
    compiled: list[Any] = []
    compile_one = guides._compile

    def watch(schema: Mapping[str, Any]) -> Guide:
        compiled.append(schema)
        return compile_one(schema)

    monkeypatch.setattr(guides, "_compile", watch)
    first, again = guides.start(form(SCHEMA)), guides.start(form(SCHEMA))
    assert len(compiled) == 1
    first.push(ord("{"))
    assert first.allowed() != again.allowed(), "they share their state"
    for number in range(MAX_COMPILED):
        guides.start(form({"const": number}))
    guides.start(form(SCHEMA))
    assert len(compiled) == 2 + MAX_COMPILED


def limit(monkeypatch: pytest.MonkeyPatch, states: int) -> None:
    """Give llguidance so few states, where it has a quarter of a million: forms that use up so many are slow."""
    from llguidance import LLMatcher, LLParserLimits

    def matcher(self: Guides, schema: Mapping[str, Any]) -> LLMatcher:
        grammar = LLMatcher.grammar_from_json_schema(dict(schema))
        return LLMatcher(
            self._ready_tokenizer(), grammar, log_level=0, limits=LLParserLimits(max_lexer_states=states)
        )

    monkeypatch.setattr(Guides, "_matcher", matcher)


def test_a_limit_met_on_the_way_is_an_error_and_not_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit every token but the end is ruled out: the end that follows is not one that the form has."""
    limit(monkeypatch, 50)
    strings = [{"type": "string", "pattern": pattern} for pattern in ("^a{3}$", "(.*a.{200})+")]
    with engine() as served:
        good, bad = served.generate(
            [[1], [1]], [params(schema, logit_bias={ord("a"): 100.0}) for schema in strings]
        )
    assert good.text == '"aaa"'
    assert len(bad.token_ids) > 1, "it met the limit at once"
    assert isinstance(bad.error, RequestError)
    assert "response_format cannot be followed: lexer error: too many states" in str(bad.error)
    with engine() as served:  # no end may be chosen, and nothing else
        banned = ask(served, params(strings[1], logit_bias={ord("a"): 100.0}, min_tokens=79))
    assert str(banned.error) == str(bad.error)


def test_a_limit_met_at_once_refuses_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    guides = Guides(tiny_tokenizer(), vocab_size=CONFIG.vocab_size, eos_token_ids=CONFIG.eos_token_ids)
    digits = form({"type": "integer"})
    guides.start(digits)
    limit(monkeypatch, 2)
    guides = Guides(tiny_tokenizer(), vocab_size=CONFIG.vocab_size, eos_token_ids=CONFIG.eos_token_ids)
    with pytest.raises(RequestError, match="the JSON schema asks too much: lexer error: too many states"):
        guides.start(digits)
