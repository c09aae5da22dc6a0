"""Frames arrive as they were sent, however the socket cuts them; a closed pipe is noticed at both ends."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest

from manylora.server.channel import AsyncChannel, Channel, ChannelClosed
from manylora.server.messages import (
    Call,
    Cancel,
    Chunk,
    EngineSetup,
    ErrorInfo,
    Refused,
    Reply,
    Step,
    Submit,
    ToApi,
    ToEngine,
    TokenLogprobs,
)
from manylora.text.config import EngineConfig
from manylora.text.stats import EngineStats
from tests.server.engines import run
from tests.text.engines import engine


class Note(msgspec.Struct):
    text: str


LONG = "x" * 3_000_000  # far beyond a socket's buffer
NOTES = [Note(""), Note("a"), Note(LONG), Note("\N{SNOWMAN}"), *(Note(str(i)) for i in range(50))]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def test_frames_pass_both_ways_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    blocking: Channel[Note] = Channel(pair[1], Note)

    def echo() -> None:
        for _ in NOTES:
            blocking.send(blocking.receive())

    async def talk() -> list[Note]:
        channel: AsyncChannel[Note] = await AsyncChannel.open(pair[0], Note)
        for note in NOTES:
            channel.send(note)
        heard = [await channel.receive() for _ in NOTES]
        await channel.close()
        return heard

    thread = threading.Thread(target=echo)
    thread.start()
    assert run(talk()) == NOTES
    thread.join()


def test_a_frame_that_comes_byte_by_byte_is_put_together(pair: tuple[socket.socket, socket.socket]) -> None:
    payload = msgspec.msgpack.encode(Note("late"))
    frame = struct.pack("<I", len(payload)) + payload

    def drip() -> None:
        for byte in frame:
            pair[0].sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    channel: Channel[Note] = Channel(pair[1], Note)
    assert channel.receive() == Note("late")
    thread.join()


@pytest.mark.parametrize(
    "cut", [0, 2, 4, 7], ids=["between frames", "in a length", "after it", "in a payload"]
)
def test_an_end_that_closes_is_noticed(cut: int) -> None:
    payload = msgspec.msgpack.encode(Note("never whole"))
    part = (struct.pack("<I", len(payload)) + payload)[:cut]

    def open_and_close() -> socket.socket:
        here, there = socket.socketpair()
        here.sendall(part)
        here.close()
        return there

    blocking: Channel[Note] = Channel(open_and_close(), Note)
    with pytest.raises(ChannelClosed):
        blocking.receive()
    with pytest.raises(ChannelClosed):
        blocking.send(Note(LONG))
    blocking.close()

    async def listen() -> None:
        channel: AsyncChannel[Note] = await AsyncChannel.open(open_and_close(), Note)
        with pytest.raises(ChannelClosed):
            await channel.receive()
        await channel.close()
        with pytest.raises(ChannelClosed):
            channel.send(Note("nobody"))

    run(listen())


def test_closing_wakes_the_thread_that_receives(pair: tuple[socket.socket, socket.socket]) -> None:
    channel: Channel[Note] = Channel(pair[1], Note)
    ended = threading.Event()

    def listen() -> None:
        with pytest.raises(ChannelClosed):
            channel.receive()
        ended.set()

    thread = threading.Thread(target=listen)
    thread.start()
    assert not ended.wait(0.1)
    channel.close()
    assert ended.wait(10)
    thread.join()


def _stats() -> EngineStats:
    with engine() as one:
        return one.stats()


MESSAGES = [
    EngineSetup(
        model="m",
        dtype="float32",
        device="cpu",
        engine=EngineConfig(pool_bytes=1 << 20, max_waiting=7),
        policy="cluster",
        policy_options={"max_distinct": 3, "share": 0.5},
        adapters=("a", "s3://b"),
        cache_dir=None,
        max_cache_bytes=5,
        max_rank=None,
        max_adapter_bytes=None,
        max_loaded_adapters=9,
        resolve_timeout_s=2.5,
        fetch_timeout_s=25.0,
        log_format="json",
    ),
    Submit(
        (("id", (1, 2)), ("other", (3,))),
        {"temperature": 0, "stop": ["a"]},
        (("alice", -0.5),),
        "tenant",
        0.25,
    ),
    Cancel("id"),
    Call(3, "pin", {"name": "alice"}),
    Step(
        accepted=("id",),
        refused=(Refused("other", ErrorInfo("RequestError", "no", 1.5)),),
        chunks=(
            Chunk("id", 1, "text", (4,), (TokenLogprobs(float("-inf"), ((4, -0.5),)),), "stop", None, 9, 8),
        ),
        replies=(Reply(3, {"names": ["alice"]}),),
        stats=_stats(),
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_pipe(
    message: msgspec.Struct, pair: tuple[socket.socket, socket.socket]
) -> None:
    sender: Channel[object] = Channel(pair[0], object)
    receiver: Channel[object] = Channel(pair[1], ToEngine | ToApi)
    sender.send(message)
    assert receiver.receive() == message


def test_the_loop_stays_free_while_a_frame_is_on_its_way(pair: tuple[socket.socket, socket.socket]) -> None:
    async def talk() -> int:
        channel: AsyncChannel[Note] = await AsyncChannel.open(pair[0], Note)
        receiving = asyncio.create_task(channel.receive())
        turns = 0
        while not receiving.done():
            turns += 1
            if turns == 100:
                payload = msgspec.msgpack.encode(Note("now"))
                pair[1].sendall(struct.pack("<I", len(payload)) + payload)
            await asyncio.sleep(0)
        await channel.close()
        return turns

    assert run(talk()) > 100
