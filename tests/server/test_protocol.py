"""Bodies: what each field takes, and how what it does not take is refused."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import fields
from typing import Any

import msgspec
import pytest
from pydantic import TypeAdapter, ValidationError

from manylora.server.api_errors import ApiError, ErrorDetail, from_engine
from manylora.server.body import MAX_SCHEMA_DEPTH
from manylora.server.body_errors import invalid
from manylora.server.messages import UNAVAILABLE, ErrorInfo
from manylora.server.protocol import ChatBody, CompletionBody, LoadAdapterBody, Message, TokenizeBody
from manylora.text.params import SamplingParams

COMPLETION = {"model": "m", "prompt": "p"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def refusal(model: Any, body: Any) -> ErrorDetail:
    with pytest.raises(ValidationError) as error:
        TypeAdapter(model).validate_python(body)
    located = [{**one, "loc": ("body", *one["loc"])} for one in error.value.errors()]
    answer = invalid(located, body)
    assert answer.status_code == 400
    return answer.body.error


EVERY_OPTION: dict[str, Any] = {
    "n": 2,
    "stop": ["x", "y"],
    "seed": -5,
    "temperature": 0.5,
    "top_p": 0.9,
    "presence_penalty": 1.0,
    "frequency_penalty": -1.0,
    "logit_bias": {"5": -100, "7": 2.5},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    "top_k": 4,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 3,
    "max_tokens": 9,
    "stop_token_ids": [1, 2],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "logprobs": 3,
}


def test_every_sampling_option_of_the_engine_can_be_asked_for():
    assert EVERY_OPTION.keys() == {field.name for field in fields(SamplingParams)}
    given = CompletionBody.model_validate(COMPLETION | EVERY_OPTION).sampling_params()
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    assert given == EVERY_OPTION | {"logit_bias": {5: -100, 7: 2.5}, "response_format": schema}
    params = SamplingParams.from_dict(given)
    default = SamplingParams()
    for field in fields(SamplingParams):
        assert getattr(params, field.name) != getattr(default, field.name), field.name


def test_chat_names_two_options_differently():
    body = CHAT | {"max_completion_tokens": 9, "logprobs": True, "top_logprobs": 3}
    assert ChatBody.model_validate(body).sampling_params() == {"n": 1, "max_tokens": 9, "logprobs": 3}
    assert ChatBody.model_validate(CHAT | {"max_tokens": 9}).sampling_params() == {"n": 1, "max_tokens": 9}
    assert ChatBody.model_validate(CHAT | {"logprobs": True}).sampling_params()["logprobs"] == 0
    assert "logprobs" not in ChatBody.model_validate(CHAT | {"logprobs": False}).sampling_params()


def test_an_option_left_out_is_left_to_the_engine():
    assert CompletionBody.model_validate(COMPLETION).sampling_params() == {"n": 1, "max_tokens": 16}
    assert ChatBody.model_validate(CHAT).sampling_params() == {"n": 1}
    null = dict.fromkeys(EVERY_OPTION)
    assert CompletionBody.model_validate(COMPLETION | null).sampling_params() == {}
    for neutral in ({"top_k": -1}, {"response_format": {"type": "text"}}):
        assert CompletionBody.model_validate(COMPLETION | neutral).sampling_params() == {
            "n": 1,
            "max_tokens": 16,
        }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", 1001),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("seed", 2**65),
        ("logprobs", -1),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("ignore_eos", 1),
        ("max_tokens", 2.5),
    ],
)
def test_bounds_are_those_of_the_engine(name, value):
    """Here with the field's name; the engine would refuse it too."""
    with pytest.raises(Exception, match=name):
        SamplingParams.from_dict({name: value})
    detail = refusal(CompletionBody, COMPLETION | {name: value})
    assert detail.param is not None
    assert detail.param.split(".")[0] == name
    assert detail.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("model", "body", "field", "asks", "neutral"),
    [
        (CompletionBody, COMPLETION, "best_of", 2, 1),
        (CompletionBody, COMPLETION, "echo", True, False),
        (CompletionBody, COMPLETION, "suffix", "end", None),
        (ChatBody, CHAT, "tools", [{"type": "function"}], []),
        (ChatBody, CHAT, "tool_choice", "auto", "none"),
        (ChatBody, CHAT, "functions", [{}], None),
        (ChatBody, CHAT, "audio", {}, None),
        (ChatBody, CHAT, "modalities", ["audio"], ["text"]),
        (ChatBody, CHAT, "store", True, False),
        (ChatBody, CHAT, "reasoning_effort", "high", None),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model, body, field, asks, neutral):
    model.model_validate(body | {field: neutral})
    detail = refusal(model, body | {field: asks})
    assert detail.param is not None
    assert detail.param.split(".")[0] == field
    assert "not supported" in detail.message


@pytest.mark.parametrize(
    ("model", "body", "param", "says"),
    [
        (CompletionBody, COMPLETION | {"max_token": 5}, "max_token", "did you mean 'max_tokens'"),
        (CompletionBody, COMPLETION | {"guided_json": {}}, "guided_json", "unknown field"),
        (ChatBody, CHAT | {"prompt": "x"}, "prompt", "unknown field"),
        (ChatBody, {"model": "m"}, "messages", "required"),
        (CompletionBody, [1], None, "the body"),
        (CompletionBody, {"prompt": "p"}, "model", "required"),
        (CompletionBody, COMPLETION | {"prompt": []}, "prompt", "at least 1"),
        (CompletionBody, COMPLETION | {"prompt": ["a", 1]}, "prompt", "string"),
        (CompletionBody, COMPLETION | {"prompt": [1, 2.5]}, "prompt", "got [1, 2.5]"),
        (CompletionBody, COMPLETION | {"max_tokens": "5"}, "max_tokens", "integer, got '5'"),
        (CompletionBody, COMPLETION | {"max_tokens": True}, "max_tokens", "integer, got True"),
        (CompletionBody, COMPLETION | {"stream_options": {}}, "stream_options", "`stream`: true"),
        (CompletionBody, COMPLETION | {"logit_bias": {"a": 1}}, "logit_bias.a", "pattern"),
        (CompletionBody, COMPLETION | {"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        (CompletionBody, COMPLETION | {"lora": [{"nam": "a"}]}, "lora.0.nam", "unknown field"),
        (CompletionBody, COMPLETION | {"lora": [{"name": 5}]}, "lora.0.name", "string"),
        (CompletionBody, COMPLETION | {"lora": {"a": float("nan")}}, "lora", "finite"),
        (
            CompletionBody,
            COMPLETION | {"response_format": {"type": "xml"}},
            "response_format",
            "json_schema",
        ),
        (
            CompletionBody,
            COMPLETION | {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "response_format.json_schema.schema",
            "dictionary",
        ),
        (ChatBody, CHAT | {"top_logprobs": 2}, "top_logprobs", "`logprobs`: true"),
        (ChatBody, CHAT | {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one"),
        (
            ChatBody,
            CHAT | {"continue_final_message": True},
            "continue_final_message",
            "add_generation_prompt",
        ),
        (ChatBody, CHAT | {"messages": []}, "messages", "at least 1"),
        (ChatBody, CHAT | {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        (ChatBody, CHAT | {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (
            ChatBody,
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content",
            "string",
        ),
        (
            ChatBody,
            CHAT | {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
            "not supported",
        ),
        (TokenizeBody, {"prompt": 5}, "prompt", "string"),
        (TokenizeBody, {"messages": 5}, "messages", "list"),
        (LoadAdapterBody, {"lora_name": "a", "lora_path": "/etc"}, "lora_path", "below an adapter root"),
        (
            LoadAdapterBody,
            {"lora_name": "a", "lora_path": "x/../../y"},
            "lora_path",
            "below an adapter root",
        ),
        (LoadAdapterBody, {"lora_name": ""}, "lora_name", "at least 1"),
    ],
)
def test_a_wrong_body_is_told_which_field_and_what_it_takes(model, body, param, says):
    detail = refusal(model, body)
    assert detail.param == param
    assert says in detail.message
    assert "Input should" not in detail.message  # said in our words


def test_a_million_wrong_items_are_told_as_one():
    body = COMPLETION | {"prompt": [None] * 1_000_000}
    began = time.process_time()
    detail = refusal(CompletionBody, body)
    assert time.process_time() - began < 2  # 10 s, and a gigabyte, for an error of each
    assert (detail.param or "").startswith("prompt")
    assert "null" in detail.message or "None" in detail.message


def test_a_long_value_is_not_repeated_in_full():
    assert len(refusal(CompletionBody, COMPLETION | {"seed": "9" * 100_000}).message) < 300


def test_samples_of_all_prompts_are_bounded():
    for prompts in (["p"] * 128, [[1, 2]] * 128):
        assert CompletionBody.model_validate(COMPLETION | {"prompt": prompts, "n": 8}).n == 8
        error = refusal(CompletionBody, COMPLETION | {"prompt": prompts, "n": 9})
        assert error.param == "prompt"
        assert "128 prompts with `n`: 9 are 1,152 samples; one request may ask for 1,024" in error.message
    for one_prompt in ("p", list(range(2000))):
        assert CompletionBody.model_validate(COMPLETION | {"prompt": one_prompt, "n": 128}).n == 128


def test_a_schema_may_be_deep_but_not_endless():
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for _ in range(depth - 1):
            schema = {"properties": schema}
        return COMPLETION | {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}

    CompletionBody.model_validate(nested(MAX_SCHEMA_DEPTH))
    assert "levels" in refusal(CompletionBody, nested(MAX_SCHEMA_DEPTH + 1)).message


def test_integers_of_a_schema_have_64_bits():
    def bounded(maximum: int) -> dict[str, Any]:
        schema = {"properties": {"count": {"maximum": maximum}}}
        return COMPLETION | {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}

    given = CompletionBody.model_validate(bounded(2**63 - 1)).sampling_params()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(given)) == given
    assert "64 bits" in refusal(CompletionBody, bounded(2**63)).message


def test_messages_as_templates_take_them():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert Message.model_validate({"role": "developer", "content": parts}).rendered() == {
        "role": "system",
        "content": "one\ntwo",
    }
    # As the answer of a chat comes back in the next request.
    echo: dict[str, Any] = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    assert Message.model_validate(echo).rendered() == {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    ("kind", "began", "status"),
    [
        ("RequestError", False, 400),
        ("ConfigError", False, 400),
        ("AdapterFormatError", True, 400),
        ("AdapterMismatchError", True, 400),
        ("AdapterNotFoundError", False, 404),
        ("AdapterNotFoundError", True, 503),
        ("CapacityError", False, 413),
        ("OverloadedError", False, 429),
        ("OverloadedError", True, 503),
        ("AdapterUnavailableError", True, 503),
        (UNAVAILABLE, True, 503),
        ("ZeroDivisionError", True, 500),
    ],
)
def test_errors_of_the_engine_become_statuses(kind, began, status):
    info = ErrorInfo(kind, "the reason", retry_after_s=2.2 if kind == "OverloadedError" else None)
    error = from_engine(info, began=began, request_id="id-7", adapters=["a"])
    assert error.status_code == status
    message = error.body.error.message
    hides_the_reason = {500: "id-7", 404: "`a`"} | ({503: "`a`"} if kind == "AdapterNotFoundError" else {})
    assert hides_the_reason.get(status, "the reason") in message
    assert ("the reason" in message) == (status != 500 and kind != "AdapterNotFoundError")
    retry = (error.headers or {}).get("Retry-After")
    assert retry == {"OverloadedError": "3"}.get(kind, "1" if status == 503 else None)
    response = error.response()
    assert msgspec.json.decode(response.body)["error"].keys() == {"message", "type", "param", "code"}


def test_an_api_error_keeps_its_param():
    assert ApiError(400, "no", param="x.0.y").body.error.param == "x.0.y"


def test_the_http_side_needs_no_torch():
    script = (
        "import sys; import manylora.server.app; print('fastapi' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
