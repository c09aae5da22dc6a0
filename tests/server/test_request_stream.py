"""An answer is bounded, and every sample of it ends exactly once, whatever becomes of engine and reader."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from manylora.server.messages import UNAVAILABLE, Chunk, ErrorInfo
from manylora.server.request_stream import RequestStream, StreamLimits
from tests.server.engines import run

DIED = ErrorInfo(UNAVAILABLE, "the engine has stopped")


def stream_of(num_samples: int = 1, **limits: Any) -> tuple[RequestStream, list[str]]:
    """A stream, and the ids for which it has asked the engine to cancel."""
    cancelled: list[str] = []
    return RequestStream("id", num_samples, StreamLimits(**limits), cancelled.append), cancelled


def piece(text: str, index: int = 0, finish_reason: str | None = None) -> Chunk:
    return Chunk("id", index, text, finish_reason=finish_reason)


async def read(stream: RequestStream) -> list[Chunk]:
    chunks = []
    async for chunk in stream:
        chunks.append(chunk)
    return chunks


def test_chunks_come_in_order_until_every_sample_has_ended() -> None:
    async def test() -> None:
        stream, cancelled = stream_of(2)
        reading = asyncio.create_task(read(stream))
        sent = [piece("a"), piece("b", 1), piece("c", 1, "stop"), piece("d"), piece("e", 0, "length")]
        for chunk in sent:
            stream.push(chunk)
            await asyncio.sleep(0)
        assert await reading == sent
        stream.close()
        assert not cancelled

    run(test())


def test_leaving_early_cancels_and_keeps_nothing() -> None:
    async def test() -> None:
        stream, cancelled = stream_of()
        async with stream:
            stream.push(piece("a"))
            assert await anext(stream) == piece("a")
            assert not cancelled
        assert cancelled == ["id"]
        stream.push(piece("b"))
        assert await read(stream) == []

    run(test())


def _unread(
    limits: dict[str, Any], wait_s: float
) -> Coroutine[Any, Any, tuple[list[Chunk], list[str], int]]:
    async def test() -> tuple[list[Chunk], list[str], int]:
        stream, cancelled = stream_of(2, **limits)
        most = 0
        stream.push(piece("first", 1, "stop"))
        for i in range(20):
            stream.push(piece(str(i)))
            most = max(most, len(stream._chunks))
            await asyncio.sleep(wait_s)
        stream.push(piece("last", 0, "length"))
        return await read(stream), cancelled, most

    return test()


@pytest.mark.parametrize(
    ("limits", "wait_s", "says"),
    [({"max_backlog": 10}, 0.0, "20 pieces"), ({"client_timeout_s": 0.05}, 0.01, "0.05 s")],
    ids=["too many pieces", "too long"],
)
def test_a_reader_who_does_not_keep_up_loses_the_request(
    limits: dict[str, Any], wait_s: float, says: str
) -> None:
    kept, cancelled, _ = run(_unread({}, wait_s))
    assert len(kept) == 22  # nothing happens within the limits
    assert not cancelled
    left, cancelled, most = run(_unread(limits, wait_s))
    assert cancelled == ["id"]
    assert most <= 21  # of two samples
    # The sample whose end had come but was not read ends once too.
    assert sorted(chunk.index for chunk in left) == [0, 1]
    for chunk in left:
        assert chunk.error is not None
        assert says in chunk.error.message


def test_a_reader_who_keeps_reading_may_be_slow() -> None:
    async def test() -> None:
        stream, cancelled = stream_of(1, client_timeout_s=0.05)
        for i in range(6):  # twice the time allowed in all
            stream.push(piece(f"{i} a"))
            stream.push(piece(f"{i} b"))
            await anext(stream)
            await asyncio.sleep(0.02)
        assert not cancelled

    run(test())


def test_a_death_ends_those_who_have_not_ended() -> None:
    async def test() -> None:
        stream, cancelled = stream_of(3)
        reading = asyncio.create_task(read(stream))
        stream.push(piece("a", 1, "stop"))
        await asyncio.sleep(0)
        stream.fail(DIED)
        ended = [(chunk.index, chunk.error) for chunk in await reading if chunk.is_last]
        assert sorted(ended, key=lambda end: end[0]) == [(0, DIED), (1, None), (2, DIED)]
        stream.close()
        assert not cancelled  # nobody is there to be told

    run(test())
