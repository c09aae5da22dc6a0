"""Faults against a running server, one after the other; afterwards nothing is left of them.

The tiny model, and an engine that checks every page after each step: a leak ends it, and the last
lines would fail.
"""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from manylora.bench.serve.server import Server
from points import Line
from server_points.served import by_label, headers, openai_client, server_rss_bytes, tiny_server

SMALL_POOL_BYTES = 400 << 10
"""Two or three of the requests that crowd it; not a whole context and eight adapters."""

POOL_BYTES = 8 << 20
NUM_CROWD = 32
NUM_KILLED = 200
AT_A_TIME = 20
CLIENT_TIMEOUT_S = 3
PATIENCE_S = 60.0
MAX_GROWTH_BYTES = 64 << 20
LONG = 400

# Connects, asks, and is killed as soon as something came.
CLIENT = """
import os, signal, socket, sys
host, port, request = sys.argv[1], int(sys.argv[2]), sys.argv[3]
connection = socket.create_connection((host, port))
connection.sendall(request.encode())
while b"data:" not in connection.recv(4096):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass(frozen=True)
class World:
    """The server, and the folder that its adapters lie in."""

    server: Server
    adapters: Path

    @property
    def metrics(self) -> str:
        return httpx.get(self.server.url + "/metrics", headers=headers(self.server), timeout=60).text

    def post(self, body: Any, *, raw: bytes | None = None) -> httpx.Response:
        content = json.dumps(body).encode() if raw is None else raw
        told = {**headers(self.server), "Content-Type": "application/json"}
        return httpx.post(self.server.url + "/v1/completions", content=content, headers=told, timeout=120)

    def ask(self, model: str = "base", **more: Any) -> httpx.Response:
        return self.post({"model": model, "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, **more})

    def is_idle(self) -> bool:
        seen = self.server.scrape()
        return seen["manylora_requests_running"] == seen["manylora_requests_waiting"] == 0

    def idle_within_s(self) -> float:
        """How long it took until nothing ran or waited; infinite if that did not come."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE_S:
            if self.is_idle():
                return time.monotonic() - began
            time.sleep(0.05)
        return float("inf")


def lines() -> Iterator[Line]:
    with _world("--pool-bytes", str(SMALL_POOL_BYTES)) as world:
        yield _exhausted(world)
    with _world("--pool-bytes", str(POOL_BYTES), "--client-timeout-s", str(CLIENT_TIMEOUT_S)) as world:
        # Twice: what the first time takes for good, say buffers that grow, is no leak. For slow clients that is some
        # 200 MB, and 4 to 10 each time after it.
        _kill_clients(world, NUM_KILLED // 2)
        _slow_clients(world)
        world.idle_within_s()
        before = server_rss_bytes()
        for fault in FAULTS:
            yield fault(world)
        yield from _afterwards(world, before)


@contextmanager
def _world(*options: str) -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder), "--debug", *options) as server:
        yield World(server, Path(folder, "adapters"))


def _exhausted(world: World) -> Line:
    """A dozen times what the pool holds at a time; and what it can never hold."""
    before = world.server.scrape()["manylora_preemptions_total"]

    async def ask_all() -> int:
        async with openai_client(world.server) as client:
            asked = (
                client.completions.create(
                    model=f"tiny-{number % 6}",
                    prompt=[number] * 50,
                    max_tokens=200,
                    extra_body={"ignore_eos": True},
                )
                for number in range(NUM_CROWD)
            )
            answers = await asyncio.gather(*asked)
        return sum(answer.usage is not None and answer.usage.completion_tokens == 200 for answer in answers)

    finished = asyncio.run(ask_all())
    preempted = world.server.scrape()["manylora_preemptions_total"] - before
    never = world.ask(model="+".join(f"tiny-{number}" for number in range(8)), max_tokens=500)
    held = by_label(world.metrics, "manylora_pool_bytes", "kind")["kv_in_use"]
    return Line(
        f"the pool exhausted: {NUM_CROWD} requests of 250 tokens, and one that never fits",
        f"{finished} finished, {preempted:.0f} preemptions, {held:.0f} bytes held; the one: {never.status_code}",
        "all finished, some preempted, 0 held; 413",
        finished == NUM_CROWD and preempted > 0 and held == 0 and never.status_code == 413,
    )


def _killed_clients(world: World) -> Line:
    before = _ended(world)
    streaming = _kill_clients(world, NUM_KILLED)
    idle_s = world.idle_within_s()
    ended = _ended(world)
    ended.subtract(before)
    return Line(
        f"{NUM_KILLED} clients killed with SIGKILL in the middle of a stream",
        f"{streaming} streamed, {ended.total():.0f} ended, {ended['cancelled']:.0f} cancelled; idle in {idle_s:.2f} s",
        "all stream, all end, most cancelled; idle",
        streaming == ended.total() == NUM_KILLED
        and ended["cancelled"] > NUM_KILLED / 2
        and idle_s < PATIENCE_S,
    )


def _kill_clients(world: World, number: int) -> int:
    """Run so many clients, each killed when the first piece of its stream has come; returns how many had one."""
    host, _, port = world.server.url.removeprefix("http://").partition(":")
    body = json.dumps(
        {"model": "tiny-1", "prompt": [5] * 9, "max_tokens": LONG, "ignore_eos": True, "stream": True}
    )
    told = {
        **headers(world.server),
        "Host": host,
        "Content-Length": str(len(body)),
        "Content-Type": "application/json",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    request = f"POST /v1/completions HTTP/1.1\r\n{head}\r\n{body}"
    streaming = 0
    for _ in range(number // AT_A_TIME):
        command = [sys.executable, "-I", "-S", "-c", CLIENT, host, port, request]
        clients = [subprocess.Popen(command) for _ in range(AT_A_TIME)]
        streaming += sum(client.wait() == -signal.SIGKILL for client in clients)
    return streaming


def _ended(world: World) -> Counter[str]:
    """Samples that ended, by outcome."""
    return by_label(world.metrics, "manylora_requests_total", "outcome")


def _deleted_adapter(world: World) -> Line:
    """Before it was ever read, and while it answers."""
    shutil.rmtree(world.adapters / "tiny-6")
    gone = world.ask("tiny-6")
    told = {**headers(world.server), "Content-Type": "application/json"}
    body = {"model": "tiny-5", "prompt": [4] * 5, "max_tokens": LONG, "ignore_eos": True, "stream": True}
    url = world.server.url + "/v1/completions"
    with httpx.stream("POST", url, json=body, headers=told, timeout=120) as stream:
        events = 0
        for line in stream.iter_lines():
            events += line.startswith("data: {")
            if events == 5:
                shutil.rmtree(world.adapters / "tiny-5", ignore_errors=True)
    other = world.ask("tiny-0")
    return Line(
        "an adapter's files deleted",
        f"before it is read: {gone.status_code}; in use: {events} of {LONG} tokens; another: {other.status_code}",
        "4xx or 503; all tokens; 200",
        (400 <= gone.status_code < 500 or gone.status_code == 503)
        and events >= LONG
        and other.status_code == 200,
    )


def _corrupted_adapter(world: World) -> Line:
    weights = world.adapters / "tiny-7" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    bad, other = world.ask("tiny-7"), world.ask("tiny-0+tiny-1:0.5")
    return Line(
        "an adapter's file cut short",
        f"{bad.status_code}: {_message(bad)[:60]}; others: {other.status_code}",
        "4xx that names it; 200",
        400 <= bad.status_code < 500 and "tiny-7" in _message(bad) and other.status_code == 200,
    )


def _large_body(world: World) -> Line:
    answer = world.post(None, raw=b'{"model": "base", "prompt": "' + b"x" * (10 << 20) + b'"}')
    return Line("a body of 10 MB", f"{answer.status_code}", "413", answer.status_code == 413)


def _bad_bodies(world: World) -> Line:
    raw = [
        b"{",
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "base", "prompt": "x", "max_tokens": NaN}',
        b'{"model": "base", "prompt": ' + b"[" * 100_000,
        b'{"model": "base", "prompt": "\\ud800"}',
    ]
    statuses = [world.post(None, raw=body).status_code for body in raw]
    unknown = world.ask(best_off=2)
    return Line(
        f"{len(raw)} bodies that are no request, and an unknown field",
        f"{sorted(set(statuses))}; {unknown.status_code}: {_message(unknown)[:50]}",
        "no 5xx; 400 that names the field",
        max(statuses) < 500 and unknown.status_code == 400 and "best_off" in unknown.text,
    )


def _unicode_names(world: World) -> Line:
    names = [
        "ünï-çødé",
        "模型",
        "a" * 4000,
        "../tiny-0",
        "tiny-0\x00",
        "\u202etiny-0",
        "tiny-0:",
        "🦙:0.5+🦙:0.5",
        " ",
    ]
    statuses = [world.ask(name).status_code for name in names]
    return Line(
        f"{len(names)} names of unicode, of paths, and too long",
        f"{sorted(set(statuses))}",
        "400 or 404",
        set(statuses) <= {400, 404},
    )


def _slow_clients(world: World) -> Line:
    """They ask for more than any buffer holds and read nothing; others must not wait for them."""
    host, _, port = world.server.url.removeprefix("http://").partition(":")
    body = json.dumps(
        {
            "model": "base",
            "prompt": [1],
            "max_tokens": LONG,
            "n": 32,
            "logprobs": 5,
            "ignore_eos": True,
            "stream": True,
        }
    )
    told = {
        **headers(world.server),
        "Host": host,
        "Content-Length": str(len(body)),
        "Content-Type": "application/json",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    slow = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n{body}".encode())
        slow.append(connection)
    before = _ended(world)
    others = [world.ask(f"tiny-{number % 4}").status_code for number in range(8)]
    idle_s = world.idle_within_s()
    ended = _ended(world)
    ended.subtract(before)
    for connection in slow:
        connection.close()
    return Line(
        "4 clients that read nothing of 32 answers each",
        f"others: {others.count(200)} of {len(others)} answered; idle after {idle_s:.1f} s; {dict(+ended)}",
        "all others; some cancelled; idle",
        others.count(200) == len(others) and ended["cancelled"] > 0 and idle_s < PATIENCE_S,
    )


def _message(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


def _afterwards(world: World, before: int) -> Iterator[Line]:
    answer = world.ask("tiny-0")
    idle_s = world.idle_within_s()
    held = by_label(world.metrics, "manylora_pool_bytes", "kind")
    yield Line(
        "afterwards: the engine, which checks every page after each step",
        f"answers {answer.status_code}, idle after {idle_s:.2f} s",
        "200; idle",
        answer.status_code == 200 and idle_s < PATIENCE_S,
    )
    pages = sum(held.values())
    yield Line(
        "afterwards: bytes of the pool that requests hold",
        f"{held['kv_in_use']:.0f} of {pages:.0f}; {held['adapters']:.0f} of adapters, {held['free']:.0f} free",
        "0",
        held["kv_in_use"] == 0 and pages > 0.9 * POOL_BYTES,
    )
    grown = server_rss_bytes() - before
    yield Line(
        "afterwards: memory of both processes",
        f"{grown / 1e6:+.0f} MB",
        f"<= {MAX_GROWTH_BYTES / 1e6:.0f} MB",
        grown <= MAX_GROWTH_BYTES,
    )


FAULTS: tuple[Callable[[World], Line], ...] = (
    _killed_clients,
    _deleted_adapter,
    _corrupted_adapter,
    _large_body,
    _bad_bodies,
    _unicode_names,
    _slow_clients,
)
