"""An engine on the tiny model behind a pipe: its side of the pipe on a thread, the API's in the test's event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from manylora.lora.library import Library
from manylora.models.tiny import tiny_tokenizer
from manylora.server.adapter_calls import AdapterCalls
from manylora.server.channel import AsyncChannel, Channel
from manylora.server.engine_client import EngineClient, RequestStream, StreamLimits
from manylora.server.engine_process import EngineProcess
from manylora.server.messages import Chunk, ModelInfo, Ready, ToApi, ToEngine
from manylora.server.tokenizer import describe_tokenizer
from manylora.text import Engine

T = TypeVar("T")


def run(test: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine; one that hangs fails."""
    return asyncio.run(asyncio.wait_for(test, 60))


@asynccontextmanager
async def serving(
    engine: Engine, library: Library, roots: Sequence[str] = (), max_loaded: int = 100, **limits: Any
) -> AsyncIterator[EngineClient]:
    """Run the engine as its process does. Limits are those of StreamLimits."""
    here, there = socket.socketpair()
    channel: Channel[ToEngine] = Channel(there, ToEngine)
    calls = AdapterCalls(engine, library, roots, max_loaded)
    process = EngineProcess(engine, calls, channel, library.prefixes)
    crash: list[BaseException] = []

    def live() -> None:
        try:
            process.run()
        except BaseException as error:  # the test says whether it was to be expected
            crash.append(error)
        finally:
            channel.close()

    thread = threading.Thread(target=live)
    thread.start()
    ready = Ready(ModelInfo("tiny", "float64", 257, 512, (256,), 0, 0, 0), TOKENIZER, engine.stats())
    client = EngineClient(
        await AsyncChannel.open(here, ToApi), ready, StreamLimits(**limits), call_timeout_s=30
    )
    try:
        yield client
    finally:
        await client.close()
        await asyncio.to_thread(thread.join, 30)
        engine.close()
        assert not thread.is_alive(), "the engine outlives its pipe"
    if crash:
        raise crash[0]


TOKENIZER = describe_tokenizer(tiny_tokenizer())


async def gather(stream: RequestStream) -> dict[int, list[Chunk]]:
    """All chunks of a request by sample."""
    chunks: dict[int, list[Chunk]] = {}
    async with stream:
        async for chunk in stream:
            chunks.setdefault(chunk.index, []).append(chunk)
    return chunks


def tokens_of(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    return tuple(token for chunk in chunks for token in chunk.token_ids)
