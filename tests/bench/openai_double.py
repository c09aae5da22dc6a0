"""A real HTTP server that streams completions as OpenAI does, and does what the name of the model says."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

FIRST_TOKEN_S = 0.05
TOKEN_S = 0.01

FAULTS = ("full", "late", "unknown", "broken", "failing", "short", "garbage", "slow")
"""Model names that are answered in another way than with what was asked for."""


@dataclass
class Double:
    """The server, and what it was asked."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_at_a_time: int = 0
    num_cut: int = 0
    """Streams whose client left."""

    names: tuple[str, ...] = ("base", "adapter-b", "adapter-a", "adapter-c")
    """What it lists: the base, then its adapters."""

    _under_way: int = 0

    async def models(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization", ""))
        base, *adapters = self.names
        listed = [{"id": base, "parent": None}, *({"id": name, "parent": base} for name in adapters)]
        return web.json_response({"object": "list", "data": listed})

    async def metrics(self, request: web.Request) -> web.Response:
        """As manylora's engine would count if each answer were a step."""
        counts = {"steps": len(self.bodies), "adapter_loads": 3, "adapter_hits": 1, "adapter_evictions": 2}
        lines = [f"manylora_{name}_total {value}" for name, value in (counts | {"preemptions": 0}).items()]
        lines += [f"manylora_step_seconds_total {0.01 * len(self.bodies)}"]
        lines += [f"manylora_requests_running {self._under_way}", "manylora_step_adapters 2"]
        lines += ['manylora_pool_bytes{kind="free"} 9']
        return web.Response(text="\n".join(lines) + "\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        refusals = {"full": 429, "late": 503, "unknown": 404}
        if body["model"] in refusals:
            error = {"error": {"message": f"refused: {body['model']}", "code": None}}
            if body["model"] == "unknown":  # of something between, say
                return web.Response(text="<h1>refused: unknown</h1>", status=404)
            return web.json_response(error, status=refusals[body["model"]])
        self._under_way += 1
        self.most_at_a_time = max(self.most_at_a_time, self._under_way)
        try:
            return await self._stream(request, body)
        except ConnectionError:
            self.num_cut += 1
            raise
        finally:
            self._under_way -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        count = body["max_tokens"] - (body["model"] == "short")
        await asyncio.sleep(30 if body["model"] == "slow" else FIRST_TOKEN_S)
        for number in range(count):
            if number == 1 and body["model"] == "broken":
                assert request.transport is not None
                request.transport.abort()
                return response
            if number == 1 and body["model"] == "failing":
                await response.write(_event({"error": {"message": "the adapter is gone", "code": 500}}))
                return response
            text = (
                b"data: {nonsense\n\n" if body["model"] == "garbage" else _token("é", count == number + 1)
            )
            # Two pieces: a reader has to put them together.
            await response.write(text[:9])
            await response.write(text[9:])
            await asyncio.sleep(TOKEN_S)
        if body["stream_options"]["include_usage"]:
            await response.write(_event({"choices": [], "usage": {"completion_tokens": count}}))
        await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def openai_double() -> Iterator[Double]:
    """Run the server in a thread of its own."""
    double, loop, ready = Double(), asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", double.complete)
        app.router.add_get("/v1/models", double.models)
        app.router.add_get("/metrics", double.metrics)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        double.url = f"http://{host}:{port}"
        ready.set()
        await ended.wait()
        await runner.cleanup()

    ended = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield double
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\r\n\r\n"


def _token(text: str, is_last: bool) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": "length" if is_last else None, "logprobs": None}
    return _event(
        {"id": "cmpl-1", "object": "text_completion", "created": int(time.time()), "choices": [choice]}
    )
