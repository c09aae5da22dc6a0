"""Faults against a running server, one after the other; afterwards nothing is left of them.

The tiny model, a pool of few pages, and an engine that checks every page after each step: a leak ends it, and the last
lines would fail.
"""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from manylora.bench.serve_server import Server
from points import Line
from server_points.served import headers, labelled, openai_client, server_rss_bytes, tiny_server

POOL_BYTES = 3 << 20
NUM_KILLED = 200
AT_A_TIME = 20
CLIENT_TIMEOUT_S = 3
PATIENCE_S = 60.0
MAX_GROWTH_BYTES = 64 << 20
LONG = 400

# Connects, asks, says that something came, and waits to be killed.
CLIENT = """
import socket, sys, time
host, port, request = sys.argv[1], int(sys.argv[2]), sys.argv[3]
connection = socket.create_connection((host, port))
connection.sendall(request.encode())
while b"data:" not in connection.recv(4096):
    pass
print("streaming", flush=True)
time.sleep(1000)
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
    options = ["--pool-bytes", str(POOL_BYTES), "--client-timeout-s", str(CLIENT_TIMEOUT_S)]
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder), *options) as server:
        world = World(server, Path(folder, "adapters"))
        yield _exhausted(world)  # first: it takes as much memory as there will be
        before = server_rss_bytes()
        for fault in FAULTS:
            yield fault(world)
        yield from _afterwards(world, before)


def _exhausted(world: World) -> Line:
    """Twelve times as much as the pool holds at a time, and what can never fit."""
    total = world.server.scrape()

    async def ask_all() -> int:
        async with openai_client(world.server) as client:
            asked = (
                client.completions.create(
                    model=f"tiny-{number % 6}",
                    prompt=[number] * 50,
                    max_tokens=200,
                    extra_body={"ignore_eos": True},
                )
                for number in range(96)
            )
            answers = await asyncio.gather(*asked)
        return sum(answer.usage is not None and answer.usage.completion_tokens == 200 for answer in answers)

    finished = asyncio.run(ask_all())
    preempted = world.server.scrape()["manylora_preemptions_total"] - total["manylora_preemptions_total"]
    never = world.ask(model="+".join(f"tiny-{number}" for number in range(8)), max_tokens=LONG, n=64)
    return Line(
        "the pool exhausted: 96 requests of 250 tokens",
        f"{finished} finished, {preempted:.0f} preemptions; 64 samples of 8 adapters: {never.status_code}",
        "all finished; no 5xx",
        finished == 96 and never.status_code < 500,
    )


def _killed_clients(world: World) -> Line:
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
    before = _ended(world)
    streaming = 0
    for _ in range(NUM_KILLED // AT_A_TIME):
        clients = [
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", CLIENT, host, port, request], stdout=subprocess.PIPE
            )
            for _ in range(AT_A_TIME)
        ]
        for client in clients:
            assert client.stdout is not None
            streaming += client.stdout.readline() == b"streaming\n"
            client.kill()
            client.wait()
            client.stdout.close()
    idle_s = world.idle_within_s()
    ended = _ended(world)
    cancelled = ended.get("cancelled", 0) - before.get("cancelled", 0)
    all_ended = sum(ended.values()) - sum(before.values())
    return Line(
        f"{NUM_KILLED} clients killed with SIGKILL in the middle of a stream",
        f"{streaming} streamed, {all_ended:.0f} ended, {cancelled:.0f} of them cancelled; idle {idle_s:.2f} s later",
        "all stream, all end, most cancelled; idle",
        streaming == all_ended == NUM_KILLED and cancelled > NUM_KILLED / 2 and idle_s < PATIENCE_S,
    )


def _ended(world: World) -> dict[str, float]:
    """Samples that ended, by outcome."""
    by_outcome: dict[str, float] = {}
    for labels, value in labelled(world.metrics, "manylora_requests_total").items():
        outcome = labels.rpartition(",")[2]
        by_outcome[outcome] = by_outcome.get(outcome, 0) + value
    return by_outcome


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
    before = _ended(world).get("cancelled", 0)
    others = [world.ask(f"tiny-{number % 4}").status_code for number in range(8)]
    idle_s = world.idle_within_s()
    cancelled = _ended(world).get("cancelled", 0) - before
    for connection in slow:
        connection.close()
    return Line(
        "4 clients that read nothing of 32 answers each",
        f"others: {others.count(200)} of {len(others)} answered; {cancelled:.0f} cancelled, idle after {idle_s:.1f} s",
        "all others; some cancelled; idle",
        others.count(200) == len(others) and cancelled > 0 and idle_s < PATIENCE_S,
    )


def _message(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


def _afterwards(world: World, before: int) -> Iterator[Line]:
    answer = world.ask("tiny-0")
    idle_s = world.idle_within_s()
    held = labelled(world.metrics, "manylora_pool_bytes")
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
