"""API keys: whom they stand for, what they may, and that what others have does not exist for them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora.errors import ConfigError
from manylora.server.tenants import KEY_VARIABLE, Tenant, Tenants

ACME, OPS = "sk-acme-1", "sk-ops-2"
ENTRIES: list[dict[str, Any]] = [
    {"key": ACME, "tenant": "acme", "adapters": ["ali*", "team/*"]},
    {"sha256": hashlib.sha256(OPS.encode()).hexdigest(), "tenant": "ops", "adapters": ["*"], "admin": True},
]


def key_file(folder: Path, entries: Any = ENTRIES) -> Path:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": entries}))
    return path


# -- the file


def test_a_key_stands_for_its_tenant(tmp_path):
    tenants = Tenants.load(key_file(tmp_path), {})
    acme, ops = tenants.of(ACME), tenants.of(OPS)
    assert acme is not None
    assert ops is not None
    assert (acme.name, acme.is_admin, ops.name, ops.is_admin) == ("acme", False, "ops", True)
    assert [name for name in ("alice", "team/x/y", "bob", "xali") if acme.sees(name)] == [
        "alice",
        "team/x/y",
    ]
    assert ops.sees("anything/at all")
    for wrong in (None, "", ACME[:-1], ACME + "x", "sk-acme-1 ", ENTRIES[1]["sha256"], "\udcff"):
        assert tenants.of(wrong) is None


def test_toml_says_the_same(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(f'[[keys]]\nkey = "{ACME}"\ntenant = "acme"\nadapters = ["ali*"]\n')
    acme = Tenants.load(path, {}).of(ACME)
    assert acme is not None
    assert (acme.name, acme.adapters) == ("acme", ("ali*",))


def test_a_key_of_the_environment_may_everything():
    tenants = Tenants.load(None, {KEY_VARIABLE: OPS})
    admin = tenants.of(OPS)
    assert admin is not None
    assert admin.is_admin
    assert admin.sees("x")
    assert tenants.of("another") is None


def test_no_key_is_nobodys_even_where_an_entry_holds_its_digest():
    """As an operator gets it who hashes a variable that is not set."""
    tenants = Tenants([(hashlib.sha256(b"").digest(), Tenant("careless"))])
    assert tenants.are_asked_for
    assert tenants.of("") is None
    assert tenants.of(None) is None


def test_without_keys_everybody_may():
    tenants = Tenants.load(None, {})
    everybody = tenants.of(None)
    assert not tenants.are_asked_for
    assert everybody is not None
    assert everybody.is_admin


def test_nothing_that_is_kept_holds_a_key(tmp_path):
    tenants = Tenants.load(key_file(tmp_path), {})
    assert "acme" in repr(tenants._keys)
    assert ACME not in repr(tenants._keys)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([], "holds none"),
        ({}, "one list"),
        (["sk-secret"], "entry 1"),
        ([{"key": "sk-secret"}], '"tenant"'),
        ([{"key": "", "tenant": "a"}], "empty"),
        ([{"key": "sk-secret", "sha256": "0" * 64, "tenant": "a"}], "either"),
        ([{"sha256": "sk-secret", "tenant": "a"}], "64 hexadecimal"),
        ([{"key": "sk-secret", "tenant": "a", "adapter": "x"}], "expected an object with"),
        ([{"key": "sk-secret", "tenant": "a", "adapters": "x*"}], "of type list"),
        ([{"key": "sk-secret", "tenant": "a", "adapters": [1]}], "patterns"),
        ([{"key": "sk-secret", "tenant": "a", "admin": "yes"}], "of type bool"),
        ([{"key": "sk-secret", "tenant": "a", "adapters": ["x/*"], "admin": True}], "sees every adapter"),
        ([ENTRIES[0], ENTRIES[0]], "twice"),
    ],
)
def test_a_wrong_file_is_refused_without_telling_a_key(tmp_path, entries, says):
    with pytest.raises(ConfigError, match=says) as refused:
        Tenants.load(key_file(tmp_path, entries), {})
    assert "sk-" not in str(refused.value)


@pytest.mark.parametrize("text", ["{sk-secret", "\x00"])
@pytest.mark.parametrize("name", ["keys.json", "keys.toml"])
def test_an_unreadable_file_is_refused_without_telling_a_key(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="no valid") as refused:
        Tenants.load(tmp_path / name, {})
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tenants.load(tmp_path / "none.json", {})


# -- over HTTP


@pytest.fixture(scope="module")
def guarded(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> httpx.Client:
    client: httpx.Client = serve(api_keys=key_file(tmp_path_factory.mktemp("keys")))
    return client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def complete(client: httpx.Client, model: str, key: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "hello", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body | more, headers=bearer(key))


def test_without_a_key_only_the_probes_answer(guarded):
    for path in ("/health", "/ready", "/version", "/openapi.json"):
        assert guarded.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/v1/models/alice", "/nowhere"):
        for headers in ({}, bearer("wrong"), {"Authorization": ACME}, {"Authorization": f"Basic {ACME}"}):
            answer = guarded.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    # A body is not even read.
    assert guarded.post("/v1/completions", content=b"{").status_code == 401


def test_what_others_have_does_not_exist(guarded):
    """First it does, for who may see it; then it answers in the very words of a name that nobody has."""
    assert complete(guarded, "secret/dave", OPS).status_code == 200
    assert complete(guarded, "alice", ACME).status_code == 200
    hidden = complete(guarded, "secret/dave", ACME)
    absent = complete(guarded, "secret/nobd", ACME)
    seen_absent = complete(guarded, "team/nobd", ACME)
    assert hidden.status_code == absent.status_code == seen_absent.status_code == 404
    assert hidden.text.replace("secret/dave", "X") == absent.text.replace("secret/nobd", "X")
    assert hidden.text.replace("secret/dave", "X") == seen_absent.text.replace("team/nobd", "X")
    mixtures = [
        complete(guarded, f"alice:1+{name}:1", ACME) for name in ("secret/dave", "secret/nobd", "team/nobd")
    ]
    assert [answer.status_code for answer in mixtures] == [404] * 3
    assert (
        len(
            {
                answer.text.replace("secret/dave", "X")
                .replace("secret/nobd", "X")
                .replace("team/nobd", "X")
                for answer in mixtures
            }
        )
        == 1
    )
    for model in ("secret/dave", "secret/nobd"):
        answer = guarded.get(f"/v1/models/{model}", headers=bearer(ACME))
        assert answer.status_code == 404
        assert answer.text.replace(model, "X") == hidden.text.replace("secret/dave", "X")


def test_the_engine_is_not_asked_about_names_that_a_tenant_cannot_see(guarded, running, monkeypatch):
    """So the time of the answer cannot tell what the engine knows of them."""
    asked: list[str] = []
    for method in ("submit_all", "adapter_info"):
        real = getattr(running.client, method)

        def noting(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            asked.append(str(args))
            return real(*args, **kwargs)

        monkeypatch.setattr(running.client, method, noting)
    assert complete(guarded, "alice", ACME).status_code == 200
    assert len(asked) == 1  # the wrapper sees what is asked
    for model in ("secret/dave", "secret/nobd", "alice:1+bob:1"):
        assert complete(guarded, model, ACME).status_code == 404
    for model in ("secret/dave", "secret/nobd"):
        assert guarded.get(f"/v1/models/{model}", headers=bearer(ACME)).status_code == 404
    assert len(asked) == 1


def test_the_list_of_models_holds_what_the_key_sees(guarded):
    def listed(key: str) -> list[str]:
        answer = guarded.get("/v1/models", headers=bearer(key)).json()
        return [model["id"] for model in answer["data"]]

    assert listed(ACME) == ["tiny", "alice", "team/carol"]
    assert set(listed(OPS)) > {"tiny", "alice", "secret/dave"}


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin"])
def test_only_administrators_change_adapters(guarded, verb):
    path, body = f"/v1/{verb}_lora_adapter", {"lora_name": "no/such"}
    assert guarded.post(path, json=body, headers=bearer(ACME)).status_code == 403
    assert guarded.post(path, json=body, headers=bearer(OPS)).status_code == 404
    assert guarded.get("/metrics", headers=bearer(ACME)).status_code == 403
    assert guarded.get("/metrics", headers=bearer(OPS)).status_code == 200


def test_tenants_share_no_prefixes(guarded):
    """With one key the second request finds the first one's prompt; with another it does not."""

    def cached(key: str) -> int:
        answer = complete(guarded, "tiny", key, prompt="a prompt that is several pages long" * 3)
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    cached(ACME)
    assert cached(ACME) > 0
    assert cached(OPS) == 0
    assert cached(OPS) > 0


def test_the_log_names_the_tenant_and_never_the_key(guarded, caplog):
    with caplog.at_level(logging.DEBUG):
        complete(guarded, "alice", ACME)
        complete(guarded, "alice", "sk-wrong-key")
    lines = [record for record in caplog.records if record.name == "manylora.access"]
    assert [record.fields.get("tenant") for record in lines] == ["acme", None]
    assert [record.fields["status"] for record in lines] == [200, 401]
    everything = "".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "sk-" not in everything


def test_the_document_says_that_a_key_is_needed(guarded, api):
    assert guarded.get("/openapi.json").json()["security"] == [{"key": []}]
    assert "security" not in api.get("/openapi.json").json()
