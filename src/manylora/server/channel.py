"""Frames over a socket: four bytes of length, then msgpack. A blocking end for threads, and one for an event loop.

Knows no messages: each end is told which type it receives.
"""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec

_LENGTH = struct.Struct("<I")

In = TypeVar("In")


class ChannelClosed(ConnectionError):
    """The other process has closed its end, or has died."""


class Channel(Generic[In]):
    """The blocking end. One thread may send while another receives."""

    def __init__(self, connection: socket.socket, receives: Any) -> None:
        """receives: the type, or union of types, of what comes in."""
        self._socket = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(receives)
        self._frame = bytearray()  # kept, so that sending allocates nothing

    def send(self, message: msgspec.Struct) -> None:
        """Send a frame. Waits as long as the socket's buffer is full: a reader that stalls stalls the sender.

        Raises:
            ChannelClosed: nobody is there to receive it.
        """
        try:
            self._socket.sendall(_framed(self._encoder, message, self._frame))
        except OSError as error:
            raise ChannelClosed from error

    def receive(self) -> In:
        """Wait for a frame.

        Raises:
            ChannelClosed: no more will come.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._decoder.decode(self._read(length))

    def close(self) -> None:
        """Close this end, also for a thread that waits in `receive`."""
        with suppress(OSError):  # the other end was quicker
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        rest = memoryview(data)
        while rest:
            try:
                num_read = self._socket.recv_into(rest)
            except OSError as error:
                raise ChannelClosed from error
            if num_read == 0:
                raise ChannelClosed
            rest = rest[num_read:]
        return data


class AsyncChannel(Generic[In]):
    """The end of an event loop. Made by `open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receives: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(receives)

    @classmethod
    async def open(cls, connection: socket.socket, receives: Any) -> "AsyncChannel[In]":
        """receives: the type, or union of types, of what comes in."""
        reader, writer = await asyncio.open_connection(sock=connection)
        return cls(reader, writer, receives)

    def send(self, message: msgspec.Struct) -> None:
        """Send a frame, without waiting: the other end reads at once whatever it is busy with.

        Raises:
            ChannelClosed: nobody is there to receive it.
        """
        if self._writer.is_closing():
            raise ChannelClosed
        self._writer.write(_framed(self._encoder, message, bytearray()))

    async def receive(self) -> In:
        """Wait for a frame.

        Raises:
            ChannelClosed: no more will come.
        """
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed from error

    async def close(self) -> None:
        """Close this end; what was sent is still delivered."""
        self._writer.close()
        with suppress(OSError):  # the other end was quicker
            await self._writer.wait_closed()


def _framed(encoder: msgspec.msgpack.Encoder, message: msgspec.Struct, frame: bytearray) -> bytearray:
    frame[:] = b"\0" * _LENGTH.size
    encoder.encode_into(message, frame, _LENGTH.size)
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return frame
