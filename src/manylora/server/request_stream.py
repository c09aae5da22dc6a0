"""The answer to one request, on its way from the engine to its client; bounded, however slowly the client reads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

from manylora.server.messages import UNAVAILABLE, Chunk, ErrorInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamLimits:
    """What a client may ask of the server's patience."""

    max_backlog: int = 4096
    """Most chunks of a sample that wait to be read. Those of all samples of a request are counted together."""

    client_timeout_s: float = 30.0
    """Longest that chunks may wait with none being read."""


class RequestStream:
    """The chunks of one accepted request, until every sample has ended. Leaving `async with` cancels what has not.

    Every sample ends with exactly one chunk that `is_last`, whatever happens: an error of the engine, its death, or a
    reader too slow to keep up come as that chunk's `error`.
    """

    def __init__(
        self, request_id: str, num_samples: int, limits: StreamLimits, send_cancel: Callable[[str], None]
    ) -> None:
        self.request_id = request_id
        self._limits = limits
        self._send_cancel = send_cancel
        self._num_samples = num_samples
        self._ended: set[int] = set()  # samples whose last chunk has come
        self._chunks: deque[Chunk] = deque()
        self._has_chunks = asyncio.Event()
        self._read_at = 0.0  # when the reader last took a chunk, or found none
        self._is_closed = (
            False  # nothing more is taken in: nobody reads it, or the last chunks are there already
        )

    # -- for whoever asked

    def cancel(self) -> None:
        """End the request now; its last chunks say "cancelled". No effect on one that has ended."""
        if not self.has_ended:
            self._send_cancel(self.request_id)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self.has_ended or self._is_closed:
                raise StopAsyncIteration
            self._has_chunks.clear()
            await self._has_chunks.wait()
        self._read_at = _now()
        return self._chunks.popleft()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nobody will read on: cancel what has not ended."""
        self.cancel()
        self._is_closed = True
        self._chunks.clear()
        self._has_chunks.set()

    # -- for the engine's client

    @property
    def has_ended(self) -> bool:
        """Whether the engine is done with every sample."""
        return len(self._ended) == self._num_samples

    def push(self, chunk: Chunk) -> None:
        """Take what a step brought. A reader that does not keep up loses the request, and no one else waits for it."""
        if chunk.is_last:
            self._ended.add(chunk.index)
        if self._is_closed:
            return
        if not self._chunks:
            self._read_at = _now()
        self._append(chunk)
        if len(self._chunks) > self._limits.max_backlog * self._num_samples:
            self._drop(f"the client has left {len(self._chunks) - 1} pieces of the answer unread")
        elif _now() - self._read_at > self._limits.client_timeout_s:
            self._drop(f"the client has read nothing for {self._limits.client_timeout_s:g} s")

    def fail(self, error: ErrorInfo) -> None:
        """End every sample that has not ended: nothing more will come of the engine."""
        running = self._running()
        self._ended.update(running)
        if not self._is_closed:
            self._end(running, error)

    # -- inside

    def _drop(self, why: str) -> None:
        """Keep nothing of what has not been read but that it ended."""
        self.cancel()
        lost = {*self._running(), *(chunk.index for chunk in self._chunks if chunk.is_last)}
        self._chunks.clear()
        self._end(lost, ErrorInfo(UNAVAILABLE, why))

    def _running(self) -> list[int]:
        return [index for index in range(self._num_samples) if index not in self._ended]

    def _end(self, samples: Iterable[int], error: ErrorInfo) -> None:
        for index in samples:
            self._append(Chunk(self.request_id, index, error=error))
        self._is_closed = True
        self._has_chunks.set()

    def _append(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._has_chunks.set()


def _now() -> float:
    return asyncio.get_running_loop().time()
