"""`manylora serve` as processes: what it says, what it loads, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from manylora.cli.app import app
from manylora.cli.fields import field_docs
from manylora.errors import ConfigError, ModelError
from manylora.models.tiny import tiny_tokenizer
from manylora.server import engine_process, launch
from manylora.server.channel import AsyncChannel
from manylora.server.config import ServerConfig
from manylora.server.messages import ToApi
from manylora.server.tokenizer import build_tokenizer, describe_tokenizer
from manylora.text.config import EngineConfig
from manylora.text.policies import POLICIES
from tests.server.engines import run, serving
from tests.text.engines import engine, library

MANY = 10_000
END_S = 60
"""Patience with a process that is to end; a busy machine is slow."""


class Server:
    """A server as its own process."""

    def __init__(self, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "manylora",
            "serve",
            *options,
            "--port",
            "0",
            "--log-format",
            "json",
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self._has_line = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._has_line:
                self.lines.append(json.loads(line) if line.startswith("{") else {"message": line})
                self._has_line.notify_all()

    def line(self, message: str) -> dict[str, Any]:
        """Wait for a log line with this message."""

        def found() -> dict[str, Any] | None:
            return next((line for line in self.lines if message in line["message"]), None)

        with self._has_line:
            assert self._has_line.wait_for(found, timeout=240), self.lines
            line = found()
        assert line is not None
        return line

    @property
    def url(self) -> str:
        return str(self.line("ready")["url"])

    @property
    def engine(self) -> psutil.Process:
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def end(self) -> int:
        """Wait for the end; returns the exit status, when all lines of the log are there."""
        status = self.process.wait(END_S)
        self._reader.join(END_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.end()


@pytest.fixture(scope="module")
def many_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are listed as adapters and cannot be read as such: reading one of them would fail."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "0.safetensors").write_bytes(b"garbage")
    for i in range(1, MANY):
        os.link(folder / "0.safetensors", folder / f"{i}.safetensors")
    return folder


@pytest.fixture(scope="module")
def servers(model_folder: Path, adapters_folder: Path, many_adapters: Path) -> Iterator[list[Server]]:
    """Three, since each can end but once; started together, since starting takes longest."""
    roots = ("--adapters", str(adapters_folder), "--adapters", str(many_adapters))
    pool = ("--pool-bytes", str(4 << 20))
    with ExitStack() as stack:
        started = [Server(str(model_folder), *roots, *pool) for _ in range(3)]
        for server in started:
            stack.callback(server.kill)
        yield started


class Answer:
    """A long answer of which the first event has been read."""

    def __init__(self, url: str) -> None:
        self._stack = ExitStack()
        client = self._stack.enter_context(httpx.Client(timeout=240))
        body = {"model": "alice", "prompt": "x", "max_tokens": 400, "temperature": 0, "stream": True}
        post = client.stream("POST", f"{url}/completions", json={**body, "ignore_eos": True})
        response = self._stack.enter_context(post)
        assert response.status_code == 200
        self._lines = response.iter_lines()
        self.events = [self._next()]

    def rest(self) -> list[dict[str, Any]]:
        """All events."""
        with self._stack:
            while (event := self._next()) is not None:
                self.events.append(event)
        return self.events

    def _next(self) -> Any:
        for line in self._lines:
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                return None if data == "[DONE]" else json.loads(data)
        return None


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_it_starts_with_thousands_of_adapters_without_reading_one(servers: list[Server]) -> None:
    ready = servers[0].line("ready")
    assert ready["num_adapters"] == MANY + 5
    assert (ready["model"], ready["dtype"], ready["policy"]) == ("tiny", "float32", "fcfs")
    assert 0 < ready["pool_bytes"] <= 4 << 20
    assert ready["url"].startswith("http://127.0.0.1:")
    with httpx.Client(base_url=ready["url"], timeout=240) as client:
        answer = client.post("/completions", json={"model": "17", "prompt": "x"})
        assert answer.status_code == 400  # what is named is read, and this is no adapter
        assert "17" in answer.json()["error"]["message"]


def test_the_process_that_answers_http_has_no_torch(servers: list[Server]) -> None:
    servers[0].line("ready")
    assert has_torch(servers[0].engine.pid)
    assert not has_torch(servers[0].process.pid)


def test_told_to_end_it_finishes_what_is_under_way(servers: list[Server]) -> None:
    server = servers[0]
    answer, engine = Answer(server.url), server.engine
    server.process.send_signal(signal.SIGTERM)
    server.line("told to end")
    events = answer.rest()
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert server.end() == 0
    assert not engine.is_running()
    order = [line["message"] for line in server.lines]
    assert order.index("told to end; draining") < len(order) - 1 - order[::-1].index("POST /v1/completions")


def test_while_it_drains_probes_and_clients_are_told_so() -> None:
    config = ServerConfig(model="m", served_model_name="tiny", port=0, drain_notice_s=300.0)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}

    async def test() -> int:
        source = library()
        async with serving(engine(source=source), source) as client:
            listener = launch._bound(config)
            listener.listen()  # so that who connects waits until it is served
            served = asyncio.create_task(launch._serve_http(config, client, tiny_tokenizer(), listener))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as http:
                assert (await http.get("/ready")).status_code == 200
                assert (await http.post("/v1/completions", json=body)).status_code == 200
                os.kill(os.getpid(), signal.SIGTERM)
                while not client.is_draining:
                    await asyncio.sleep(0.01)
            # A new connection, as a probe makes it.
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as http:
                assert (await http.get("/ready")).status_code == 503
                assert (await http.get("/health")).status_code == 200
                refused = await http.post("/v1/completions", json=body)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert not served.done()
            os.kill(os.getpid(), signal.SIGTERM)  # the second time: at once
            return await asyncio.wait_for(served, 120)

    assert run(test()) == 0


def test_an_engine_that_dies_is_told_to_clients_and_ends_the_server(servers: list[Server]) -> None:
    server = servers[1]
    answer = Answer(server.url)
    server.engine.kill()
    events = answer.rest()
    assert "engine" in events[-1]["error"]["message"]
    assert server.end() == 1
    server.line("the engine process has ended by itself")


def test_the_engine_ends_with_a_server_that_is_killed(servers: list[Server]) -> None:
    server = servers[2]
    answer, engine = Answer(server.url), server.engine
    server.process.kill()
    with pytest.raises(httpx.TransportError):
        answer.rest()
    server.end()
    engine.wait(END_S)


LIGHT = """
import sys
import manylora.cli.app, manylora.cli.serve, manylora.server.app, manylora.server.launch
from manylora.server.tokenizer import build_tokenizer
from manylora.server.messages import TokenizerInfo
import msgspec
tokenizer = build_tokenizer(msgspec.json.decode(sys.stdin.buffer.read(), type=TokenizerInfo))
tokens = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True, return_dict=False)
assert tokenizer.decode(tokens).startswith("user: hi"), tokenizer.decode(tokens)
print("torch" in sys.modules)
"""


def test_nothing_that_the_api_process_imports_needs_torch() -> None:
    import msgspec

    info = msgspec.json.encode(describe_tokenizer(tiny_tokenizer()))
    done = subprocess.run([sys.executable, "-c", LIGHT], input=info, capture_output=True, check=False)
    assert done.stdout.split() == [b"False"], done.stderr.decode()


def test_a_tokenizer_passes_the_pipe_whole() -> None:
    ours = tiny_tokenizer()
    theirs = build_tokenizer(describe_tokenizer(ours))
    text = "naïve <|end|> text \N{SNOWMAN}"
    messages = [{"role": "user", "content": text}]
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == ours.decode(
        ours.encode(text), skip_special_tokens=True
    )
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(
        messages, tokenize=False
    )
    assert theirs.special_tokens_map == ours.special_tokens_map


def test_told_to_end_while_the_model_loads_it_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    this = psutil.Process()
    loading: list[psutil.Process] = []

    async def load(*_: object) -> NoReturn:
        loading.extend(child for child in this.children() if "engine_process" in " ".join(child.cmdline()))
        os.kill(this.pid, signal.SIGTERM)
        await asyncio.sleep(END_S)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(launch, "_ready", load)
    before = set(this.children())
    assert asyncio.run(launch._serve(ServerConfig(model="m", port=0), EngineConfig())) == 0
    (engine,) = set(loading) - before
    assert not engine.is_running()


# -- what is refused


def test_an_address_that_is_taken_is_refused_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServerConfig(model="no such model", port=taken.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(ConfigError, match="in use"):
            asyncio.run(launch._serve(config, EngineConfig()))
        assert time.monotonic() - began < 2


def test_keys_that_cannot_be_read_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    config = ServerConfig(model="no such model", port=0, api_keys=tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=r"absent\.json"):
        asyncio.run(launch._serve(config, EngineConfig()))


def test_a_connection_whose_client_reads_nothing_is_ended_by_the_kernel() -> None:
    with launch._bound(ServerConfig(model="m", port=0, client_timeout_s=0.3)) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
            connection.settimeout(END_S)

            def fill() -> None:
                while True:
                    connection.sendall(b"unread" * 100_000)

            began = time.monotonic()
            with pytest.raises(OSError, match="timed out") as ended:
                fill()
            assert ended.value.errno == errno.ETIMEDOUT  # the kernel's, not that of the test's patience
            assert time.monotonic() - began < END_S


def test_what_an_engine_cannot_be_built_of_is_told_by_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(engine_process, "configure_logs", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["engine_process", str(there.detach())])

    async def test() -> int:
        channel: AsyncChannel[ToApi] = await AsyncChannel.open(here, ToApi)
        channel.send(launch._setup(ServerConfig(model="no/such/model"), EngineConfig()))
        status = await asyncio.to_thread(engine_process.main)
        with pytest.raises(ModelError, match="no/such/model"):
            await launch._ready(channel, 10)
        await channel.close()
        return status

    assert run(test()) == 1


def test_an_engine_that_says_nothing_is_not_waited_for() -> None:
    async def test() -> None:
        here, there = socket.socketpair()
        channel: AsyncChannel[ToApi] = await AsyncChannel.open(here, ToApi)
        with pytest.raises(ModelError, match=r"0\.05 s"):
            await launch._ready(channel, 0.05)
        there.close()
        with pytest.raises(ModelError, match="log"):
            await launch._ready(channel, 10)
        await channel.close()

    run(test())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", 65536),
        ("client_timeout_s", 0.0),
        ("drain_timeout_s", -1.0),
        ("drain_notice_s", -1.0),
        ("request_timeout_s", float("nan")),
        ("first_token_deadline_s", 5.0),  # which fcfs would not heed
        ("policy_options", ("max_distinct",)),
        ("policy_options", ("max_distinct=many",)),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any) -> None:
    ServerConfig(model="m")
    with pytest.raises(ConfigError, match=setting):
        ServerConfig(**{"model": "m", setting: value})


def test_a_deadline_is_taken_where_it_may_be_heeded() -> None:
    for policy in ("slo", "package.module:Class"):
        assert ServerConfig(model="m", policy=policy, first_token_deadline_s=5.0).heeds_deadlines


def test_every_policy_of_the_engine_is_explained() -> None:
    for name in POLICIES:
        assert f"{name}: " in field_docs(ServerConfig)["policy"]


def test_options_of_policies_are_numbers_by_name() -> None:
    config = ServerConfig(model="m", policy_options=("max_distinct=16", "share=0.5"))
    assert config.policy_values == {"max_distinct": 16, "share": 0.5}
    assert isinstance(config.policy_values["max_distinct"], int)


def test_help_teaches() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for needed in (
        "--adapters",
        "--policy",
        "fair",
        "--pool-bytes",
        "--drain-timeout-s",
        "curl",
        "pirate:0.8+json:0.5",
    ):
        assert needed in text
