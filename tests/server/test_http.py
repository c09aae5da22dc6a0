"""The server as its clients see it: a real engine process behind real sockets, and the `openai` client in front."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from manylora.lora.library import Library
from manylora.models.tiny import tiny_model, tiny_tokenizer
from manylora.server.app import create_app
from manylora.server.config import ServerConfig
from manylora.server.connection import TimedConnection
from manylora.server.prompts import Prompts
from manylora.text import Engine, EngineConfig, SamplingParams

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "hello",
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "grüße 😀"}],
    "max_tokens": 8,
    "temperature": 0,
}
MIXTURE = "alice:1+team/carol:-0.7+ünïcode:0.4"


@pytest.fixture(scope="module")
def client(api: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def offline(adapters_folder: Path) -> Iterator[Callable[..., Any]]:
    """The same model, adapters and prompts without a server: what must come over HTTP, to the token."""
    config = EngineConfig(pool_bytes=4 << 20, max_batch_tokens=64, max_num_seqs=16)
    with Engine(tiny_model(), tiny_tokenizer(), Library(adapters_folder), config) as engine:

        def generate(prompt: Any, mixture: Any = None, **params: Any) -> Any:
            return engine.generate([prompt], SamplingParams(**params), [mixture])

        yield generate


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def name_of(token_id: int) -> str:
    """A token of the tiny model, which is a byte."""
    return chr(token_id) if token_id < 128 else f"bytes:\\x{token_id:02x}"


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object, in OpenAI's shape whatever went wrong."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


# -- answers


def test_completions_equal_the_offline_engine(client, offline):
    told = set()
    for model, mixture in (("tiny", None), ("alice", "alice"), (MIXTURE, MIXTURE)):
        (want,) = offline("hello", mixture, temperature=0, max_tokens=8, ignore_eos=True)
        options = {name: value for name, value in BODY.items() if name != "ignore_eos"}
        got = client.completions.create(
            **options | {"model": model, "logprobs": 0}, extra_body={"ignore_eos": True}
        )
        choice = got.choices[0]
        assert (choice.text, choice.finish_reason) == (want.text, "length")
        assert choice.logprobs.tokens == [name_of(token_id) for token_id in want.token_ids]
        assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (5, 8, 13)
        assert (got.model, got.object) == (model, "text_completion")
        told.add(want.token_ids)
    assert len(told) == 3  # the adapters change the answer


def test_chats_equal_the_offline_engine(client, offline):
    messages = CHAT["messages"]
    for model, mixture in (("tiny", None), (MIXTURE, MIXTURE)):
        (want,) = offline(messages, mixture, temperature=0, max_tokens=8)
        got = client.chat.completions.create(**CHAT | {"model": model})
        assert got.choices[0].message.content == want.text
        assert got.choices[0].message.role == "assistant"
        assert got.choices[0].finish_reason == want.finish_reason
        stream = client.chat.completions.create(
            **CHAT | {"model": model}, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == want.text
        assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", None]
        assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, want.finish_reason]
        assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], len(want.token_ids))


def test_a_mixture_can_be_a_field_of_its_own(api):
    def text(**more: Any) -> str:
        answer = api.post("/v1/completions", json=BODY | more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    want = text(model="alice:1+bob:-0.5")
    assert want != text()
    assert want == text(lora={"alice": 1, "bob": -0.5})
    assert want == text(lora=[{"name": "bob", "weight": -0.5}, {"name": "alice"}])
    assert want == text(
        lora=[
            {"name": "bob", "weight": -0.5},
            {"name": "alice", "weight": 3},
            {"name": "alice", "weight": -2},
        ]
    )
    assert want == text(model="tiny:9+bob:-0.5+alice")
    assert text() == text(lora={}) == text(lora={"alice": 0}) == text(model="alice:1+alice:-1")


def test_a_stream_has_an_event_for_each_token_and_the_usage_last(api):
    whole = api.post("/v1/completions", json=BODY).json()
    plain = api.post("/v1/completions", json=BODY | {"stream": True})
    assert plain.headers["content-type"].startswith("text/event-stream")
    assert "".join(event["choices"][0]["text"] for event in events(plain)) == whole["choices"][0]["text"]
    assert all("usage" not in event for event in events(plain))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *told, last = events(api.post("/v1/completions", json=BODY | options))
    assert len(told) == 8
    assert [event["usage"] for event in told] == [None] * 8
    assert [event["choices"][0]["finish_reason"] for event in told] == [None] * 7 + ["length"]
    assert last["choices"] == []
    assert {k: last["usage"][k] for k in ("prompt_tokens", "completion_tokens")} == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
    }
    assert len({event["id"] for event in (*told, last)}) == 1


def test_several_prompts_and_samples_are_numbered_prompt_by_prompt(api):
    options = BODY | {"temperature": 1, "seed": 5, "n": 2, "model": "alice"}
    prompts = ["hello", "you there", [104, 105]]
    alone = [
        choice["text"]
        for prompt in ("hello", "you there", "hi")
        for choice in api.post("/v1/completions", json=options | {"prompt": prompt}).json()["choices"]
    ]
    assert len(set(alone)) == 6
    for sent in (prompts[:2], [[*b"hello"], [*b"you there"], [104, 105]]):
        answer = api.post("/v1/completions", json=options | {"prompt": sent}).json()
        assert [choice["text"] for choice in answer["choices"]] == alone[: 2 * len(sent)]
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(sent)))
        assert answer["usage"]["completion_tokens"] == 16 * len(sent)
        told = [""] * 2 * len(sent)
        for event in events(api.post("/v1/completions", json=options | {"prompt": sent, "stream": True})):
            told[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert told == alone[: 2 * len(sent)]


def test_seed_stop_and_bias_have_their_effect(api):
    def choice(**more: Any) -> dict[str, Any]:
        answer = api.post("/v1/completions", json=BODY | {"temperature": 1, "model": "alice"} | more)
        assert answer.status_code == 200, answer.text
        one: dict[str, Any] = answer.json()["choices"][0]
        return one

    assert choice(seed=1) == choice(seed=1)
    assert choice(seed=1)["text"] != choice(seed=2)["text"]
    assert choice(logit_bias={"65": 100})["text"] == "A" * 8
    stopped = choice(logit_bias={"65": 100}, stop=["AAA"], max_tokens=20)
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    kept = choice(logit_bias={"65": 100}, stop="AAA", include_stop_str_in_output=True)
    assert (kept["text"], kept["finish_reason"]) == ("AAA", "stop")
    assert choice(logit_bias={"65": 100}, stop_token_ids=[65])["text"] == ""


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_p": 5e-324},
        {"temperature": 1e-4, "top_k": 1, "min_p": 1.0},
        {"temperature": 1000, "presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 100},
        {"min_tokens": 8, "stop_token_ids": list(range(256))},
        {"seed": -(2**63)},
        {"lora": {"alice": 3e38}},
        {"lora": {"alice": 1e-300}},
    ],
)
def test_extreme_options_end_no_engine(api, extreme):
    options = {"temperature": 1, "stream": False} | extreme
    answer = api.post("/v1/completions", json=BODY | options)
    assert answer.status_code == (400 if extreme.get("lora") == {"alice": 3e38} else 200), answer.text
    assert api.get("/health").status_code == 200


@pytest.mark.parametrize("options", [{"type": "json_object"}, {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": {
        "type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
        "additionalProperties": False}},
}])  # fmt: skip
def test_an_answer_can_be_made_to_follow_json(api, options):
    body = CHAT | {"model": "alice", "temperature": 1, "seed": 3, "max_tokens": 24}
    free = api.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    with pytest.raises(ValueError, match=r"."):
        json.loads(free)  # by itself the tiny model speaks no JSON
    # White space is JSON too, and a random model loves it.
    no_spaces = {str(token_id): -100 for token_id in b" \t\n\r"}
    answer = api.post(
        "/v1/chat/completions", json=body | {"response_format": options, "logit_bias": no_spaces}
    )
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    if options["type"] == "json_schema":
        assert json.loads(choice["message"]["content"]).keys() == {"yes"}
    else:
        assert choice["message"]["content"].lstrip().startswith("{")


def test_log_probabilities_name_tokens_and_bytes(api, offline):
    (want,) = offline("hello", "alice", temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    body = BODY | {"model": "alice", "logprobs": 2}
    got = api.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert got["token_logprobs"] == pytest.approx([one.sampled for one in want.logprobs], abs=1e-4)
    assert all(len(top) in (2, 3) for top in got["top_logprobs"])
    assert [top[token] for top, token in zip(got["top_logprobs"], got["tokens"], strict=True)] == got[
        "token_logprobs"
    ]
    streamed = [
        event["choices"][0]["logprobs"]
        for event in events(api.post("/v1/completions", json=body | {"stream": True}))
    ]
    assert [one["tokens"][0] for one in streamed] == got["tokens"]
    assert [one["text_offset"][0] for one in streamed] == got["text_offset"]

    chat = api.post(
        "/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 3, "ignore_eos": True}
    ).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [3] * 8
    # Tokens of the tiny model are bytes: a part of a character is told as bytes, and together they are the answer.
    joined = bytes(byte for entry in content for byte in entry["bytes"])
    assert joined.decode(errors="replace") == chat["choices"][0]["message"]["content"]
    assert [entry["token"] for entry in content] == [name_of(entry["bytes"][0]) for entry in content]
    assert api.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["logprobs"] is None


def test_tokens_there_and_back(api):
    text = "grüße 😀"
    tokens = api.post(
        "/tokenize", json={"prompt": text, "return_token_strs": True, "model": MIXTURE}
    ).json()
    assert tokens["tokens"] == [*text.encode()]
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 512
    assert api.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = api.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    usage = api.post("/v1/chat/completions", json=CHAT).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    open_end = api.post(
        "/tokenize", json={"messages": CHAT["messages"], "add_generation_prompt": False}
    ).json()
    assert chat["tokens"][: open_end["count"]] == open_end["tokens"]
    assert chat["count"] > open_end["count"]
    assert error_of(api.post("/detokenize", json={"tokens": [5, 257]}))["param"] == "tokens"
    assert api.post("/tokenize", json={"prompt": "x", "model": "nobody"}).status_code == 404


# -- models and adapters


def test_models_are_the_base_and_the_adapters(api, client):
    listed = {model["id"]: model for model in api.get("/v1/models").json()["data"]}
    assert {"tiny", "alice", "bob", "team/carol", "ünïcode"} <= listed.keys()
    assert (listed["tiny"]["parent"], listed["tiny"]["root"]) == (None, "tiny")
    assert (listed["team/carol"]["parent"], listed["team/carol"]["root"]) == ("tiny", "team/carol")
    for name in ("tiny", "alice", "team/carol", "ünïcode"):
        assert client.models.retrieve(name).id == name
        assert api.get(f"/v1/models/{name}").json() == listed[name]
    missing = error_of(api.get("/v1/models/nobody"))
    assert missing["code"] == "model_not_found"
    assert "did you mean" not in missing["message"].lower()


def test_adapters_are_loaded_pointed_anew_and_unloaded(api):
    def answer(model: str) -> httpx.Response:
        done: httpx.Response = api.post("/v1/completions", json=BODY | {"model": model})
        return done

    def text(model: str) -> str:
        return str(answer(model).json()["choices"][0]["text"])

    def change(verb: str, **body: Any) -> dict[str, Any]:
        done = api.post(f"/v1/{verb}_lora_adapter", json=body)
        assert done.status_code == 200, done.text
        state: dict[str, Any] = done.json()
        return state

    assert text("alice") != text("bob")
    assert answer("guest").status_code == 404
    assert change("load", lora_name="guest", lora_path="alice")["id"] == "guest"
    assert text("guest") == text("alice")
    change("load", lora_name="guest", lora_path="bob")
    assert text("guest") == text("bob")
    pinned = change("pin", lora_name="guest")
    assert (pinned["pinned"], pinned["resident"]) == (True, True)
    assert change("unpin", lora_name="guest")["pinned"] is False
    assert change("unload", lora_name="guest") == {"id": "guest", "deleted": True, "object": "lora_adapter"}
    assert answer("guest").status_code == 404
    assert text("bob")  # its files are where they were


@pytest.mark.parametrize(
    ("verb", "body", "status"),
    [
        ("load", {"lora_name": "x", "lora_path": "nobody"}, 404),
        ("load", {"lora_name": "tiny", "lora_path": "alice"}, 400),
        ("load", {"lora_name": "x", "lora_path": "/etc/passwd"}, 400),
        ("load", {"lora_name": "x", "lora_path": "../../etc"}, 400),
        ("load", {"lora_name": "x", "lora_int_id": 1}, 400),
        ("unload", {"lora_name": "nobody"}, 404),
        ("pin", {"lora_name": "nobody"}, 404),
        ("unpin", {"lora_name": "nobody"}, 404),
        ("pin", {"lora_name": "alic"}, 404),
        ("pin", {"lora_name": "a\x00b"}, 404),
    ],
)
def test_what_cannot_be_managed_is_refused(api, verb, body, status):
    answer = api.post(f"/v1/{verb}_lora_adapter", json=body)
    assert answer.status_code == status, answer.text
    assert error_of(answer)["message"]
    assert "'alice'" not in answer.text, "nobody is told what else there is, nor can have it looked for"


# -- what goes wrong


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "no valid JSON"),
        (b"", 400, "the body"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "JSON"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "JSON"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "JSON"),
        (b'{"model": "tiny", "prompt": "x", "seed": 1' + b"0" * 400 + b"}", 400, "seed"),
        (b"[" * 100_000, 400, "deeply"),
        (b'"text"', 400, "the body"),
        (b'{"model": "tiny", "prompt": ""}', 400, "empty"),
        (b'{"model": "tiny", "prompt": [999]}', 400, "vocabulary"),
        (json.dumps({"model": "tiny", "prompt": "x" * 600}).encode(), 400, "context"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 600}', 400, "context"),
        (b'{"model": "a:0.5+b:x", "prompt": "x"}', 400, "no number"),
        (b'{"model": "nobody", "prompt": "x"}', 404, "`nobody`"),
        (b'{"model": "tiny", "prompt": "x", "deadline": 5}', 400, "slo"),
    ],
)
def test_a_request_that_makes_no_sense_gets_an_answer_in_openais_shape(api, body, status, says):
    for stream in (False, True):
        sent = body[:-1] + b', "stream": true}' if stream and body.endswith(b"}") else body
        answer = api.post("/v1/completions", content=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text
        assert says in error_of(answer)["message"]


def test_what_is_far_too_long_is_refused_before_it_is_tokenized(api, running, monkeypatch):
    """The tiny model has 512 tokens of context, and its longest token, a special one, a few characters."""
    longest = max(map(len, running.tokenizer.get_vocab()))
    asked: list[Callable[..., Any]] = []
    real = Prompts._run

    async def noting(self: Prompts, work: Callable[[], Any]) -> Any:
        asked.append(work)
        return await real(self, work)

    monkeypatch.setattr(Prompts, "_run", noting)
    limit = 512 * longest
    bodies: list[dict[str, Any]] = []
    for length in (limit, limit + 1):
        text = "x" * length
        chat = [{"role": "user", "content": text[10:]}, {"role": "user", "content": "x" * 10}]
        bodies += [{"prompt": text}, {"prompt": ["x", text]}, {"messages": chat}]
    for number, body in enumerate(bodies):
        asked.clear()
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        error = error_of(api.post(path, json={"model": "tiny", "max_tokens": 1} | body))
        assert bool(asked) == (number < 3)
        if number >= 3:
            assert f"{limit + 1:,} characters" in error["message"]
            assert f"{limit:,} characters at most" in error["message"]
            assert error["param"] == next(iter(body))
    assert api.post("/tokenize", json={"prompt": "x" * (limit + 1)}).status_code == 400
    assert api.post("/tokenize", json={"prompt": "x" * limit}).json()["count"] == limit


def test_other_paths_methods_and_media_types(api):
    assert error_of(api.get("/v2/nothing"))["type"] == "not_found_error"
    wrong = api.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    error_of(wrong)
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "nonsense"}):
        answer = api.post("/v1/completions", content=b"{}", headers=headers)
        assert answer.status_code == 415
        assert "application/json" in error_of(answer)["message"]


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(**CHAT, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.value.param == "tools"


def test_a_body_has_a_largest_size(serve):
    small = serve(max_body_bytes=1000)
    assert small.post("/v1/completions", json=BODY).status_code == 200
    for content in (b"x" * 10_000_000, iter([b"x" * 1000] * 3)):
        answer = small.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413
        assert "1,000" in error_of(answer)["message"]


def test_request_ids_come_back_and_stand_in_the_log(api, caplog):
    with caplog.at_level("INFO", "manylora.access"):
        given = api.post("/v1/completions", json=BODY, headers={"X-Request-Id": "job-7.a"})
        assert given.headers["x-request-id"] == "job-7.a"
        assert given.json()["id"] == "cmpl-job-7.a"
        for bad in ("x" * 200, "a b", 'a"b', ""):
            other = api.get("/v1/models", headers={"X-Request-Id": bad})
            assert other.headers["x-request-id"] != bad
            assert len(other.headers["x-request-id"]) == 32
    line = next(record for record in caplog.records if record.fields["request_id"] == "job-7.a")
    assert line.getMessage() == "POST /v1/completions"
    assert {name: line.fields[name] for name in ("status", "model", "prompt_tokens", "completion_tokens")} == {
        "status": 200, "model": "tiny", "prompt_tokens": 5, "completion_tokens": 8,
    }  # fmt: skip


def test_the_same_request_id_twice_at_once_is_two_requests(api, running):
    async def both() -> list[int]:
        async with httpx.AsyncClient(base_url=api.base_url, timeout=60) as http:
            asked = [
                http.post("/v1/completions", json=BODY, headers={"X-Request-Id": "same"}) for _ in range(3)
            ]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert running.call(both()) == [200] * 3


def test_a_fault_of_ours_is_a_500_that_names_the_request(api, running, monkeypatch, caplog):
    async def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(running.client, "submit_all", broken)
    answer = api.post("/v1/completions", json=BODY, headers={"X-Request-Id": "broken-1"})
    assert answer.status_code == 500
    message = error_of(answer)["message"]
    assert "broken-1" in message
    assert "secret" not in message
    assert any(record.exc_info and record.fields["request_id"] == "broken-1" for record in caplog.records)


def test_readiness_follows_the_engine(api, running, monkeypatch):
    assert (api.get("/health").status_code, api.get("/ready").status_code) == (200, 200)
    monkeypatch.setattr(running.client, "is_draining", True)
    assert (api.get("/health").status_code, api.get("/ready").status_code) == (200, 503)
    refused = api.post("/v1/completions", json=BODY)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1


# -- clients that leave, and clients that are slow


LONG = BODY | {"max_tokens": 500, "n": 3}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def connect(api: httpx.Client) -> socket.socket:
    url = api.base_url
    return socket.create_connection((url.host, url.port), timeout=20)


def head(length: int) -> bytes:
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(api, running, stream):
    idle = running.client.stats
    wait_for(lambda: running.client.stats.num_running == 0)
    body = json.dumps(LONG | {"stream": stream}).encode()
    with connect(api) as connection:
        connection.sendall(head(len(body)) + body)
        wait_for(lambda: running.client.stats.num_running == 3)
        assert running.client.stats.pool_bytes.kv_in_use > 0
    begun = running.client.stats.num_output_tokens
    wait_for(lambda: running.client.stats.num_running == 0)
    assert running.client.stats.pool_bytes.kv_in_use == 0
    assert running.client.stats.num_output_tokens - begun < 3 * 400  # it did not run to its end
    assert running.client.stats.num_ended >= idle.num_ended + 3


def test_a_request_may_bound_its_own_time(api, running):
    begun = time.monotonic()
    late = api.post("/v1/completions", json=LONG | {"timeout": 0.05})
    assert late.status_code == 408
    assert "0.05 s" in error_of(late)["message"]
    assert time.monotonic() - begun < 10
    first, *_, last = events(
        api.post("/v1/completions", json=LONG | {"stream": True, "timeout": 1.0, "n": 8})
    )
    assert first["choices"]
    assert last["error"]["type"] == "timeout_error"
    wait_for(lambda: running.client.stats.num_running == 0)


def test_a_request_that_is_not_accepted_yet_ends_in_time_too(api, running, monkeypatch):
    begun: list[str] = []
    ended: list[str] = []

    async def hanging(*_: Any, **__: Any) -> None:
        begun.append("one")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("one")

    monkeypatch.setattr(running.client, "submit_all", hanging)
    assert api.post("/v1/completions", json=BODY | {"timeout": 1.0}).status_code == 408
    assert (len(begun), len(ended)) == (1, 1)
    body = json.dumps(BODY).encode()
    with connect(api) as connection:  # a client that leaves
        connection.sendall(head(len(body)) + body)
        wait_for(lambda: len(begun) == 2)
    wait_for(lambda: len(ended) == 2)
    body = json.dumps(BODY | {"timeout": 0.2}).encode()
    with connect(api) as connection:  # whose time is over when its body is there
        connection.sendall(head(len(body)))
        time.sleep(0.3)
        connection.sendall(body)
        assert b" 408 " in connection.recv(4096)
    assert len(begun) == 2


def test_a_deadline_counts_from_the_arrival_of_the_head(serve, running, monkeypatch):
    left_s: list[float] = []
    submit_all = running.client.submit_all

    async def noted(*args: Any, deadline_s: float, **options: Any) -> Any:
        left_s.append(deadline_s)
        return await submit_all(*args, deadline_s=deadline_s, **options)

    monkeypatch.setattr(running.client, "submit_all", noted)
    server = serve(policy="slo")  # the engine behind it heeds no deadline
    for seconds in (60.0, 0.1):
        body = json.dumps(BODY | {"deadline": seconds}).encode()
        with connect(server) as connection:
            connection.sendall(head(len(body)))
            time.sleep(0.3)
            connection.sendall(body)
            assert b" 200 " in connection.recv(4096)
    assert 30 < left_s[0] < 59.8
    assert 0 < left_s[1] < 0.01


def test_the_server_may_bound_the_time_of_all(serve):
    assert serve(request_timeout_s=0.05).post("/v1/completions", json=LONG).status_code == 408


def test_a_client_that_does_not_read_ends_its_request(running):
    """As a full socket does, `send` does not return."""
    config = ServerConfig(model="tiny", served_model_name="tiny", client_timeout_s=0.3)
    app = create_app(running.client, config, running.tokenizer)
    body = json.dumps(LONG | {"stream": True}).encode()
    sent: list[str] = []

    async def one_request() -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not messages:
                await asyncio.Event().wait()  # the client stays
            return messages.pop()

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message["type"])
            if len(sent) == 3:
                assert running.client.stats.num_ended < begun + 3
                await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": headers,
            "query_string": b"",
        }
        await app(scope, receive, send)

    begun = running.client.stats.num_ended
    running.call(one_request())
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]
    wait_for(lambda: running.client.stats.num_ended >= begun + 3 and running.client.stats.num_running == 0)
    assert running.client.stats.pool_bytes.kv_in_use == 0


def test_a_body_that_does_not_come_is_not_waited_for(serve):
    with connect(serve(body_timeout_s=0.2)) as connection:
        connection.sendall(head(100) + b"{")
        assert b" 408 " in connection.recv(4096)


def test_a_head_that_does_not_come_is_not_waited_for(running, api):
    config = ServerConfig(model="tiny", served_model_name="tiny")
    app = create_app(running.client, config, running.tokenizer)
    with running.serve(app, http=partial(TimedConnection, head_timeout_s=0.5)) as url:
        # Requests, one after the other on one connection, are answered,
        with httpx.Client(base_url=url, timeout=60) as http:
            for _ in range(3):
                assert http.post("/v1/completions", json=BODY | {"max_tokens": 40}).status_code == 200
        # and one that comes byte by byte is not.
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            begun = time.monotonic()
            with suppress(OSError):
                for byte in head(2) * 10:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert time.monotonic() - begun < 15
            with suppress(ConnectionError):
                assert connection.recv(100) == b""
        # Nor is the rest of a body whose request has been answered.
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head(100).replace(b"/v1/completions", b"/v1/nowhere") + b"{")
            assert b" 404 " in connection.recv(4096)
            with suppress(OSError):
                connection.sendall(b" ")  # stops uvicorn's own clock
            with suppress(ConnectionError):
                while connection.recv(4096):
                    pass
