"""The API process's side of the pipe: what the HTTP side sees of the engine. One event loop; no torch.

    async with await client.submit("id-1", tokens, {"max_tokens": 8}, [("pirate", 1.0)]) as stream:
        async for chunk in stream:
            ...

Whatever the engine sends is taken in at once: that a client reads slowly is between it and its RequestStream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from manylora.errors import ManyLoraError
from manylora.server.channel import AsyncChannel, ChannelClosed
from manylora.server.messages import UNAVAILABLE, Call, Cancel, ErrorInfo, Ready, Stats, Step, Submit, ToApi
from manylora.server.request_stream import RequestStream, StreamLimits

__all__ = ["EngineClient", "EngineError", "RequestStream", "StreamLimits"]

log = logging.getLogger("manylora.server")

CANCEL_GRACE_S = 5.0
"""How long a drain waits for requests to end that it has cancelled: one step, if the engine is well."""


class EngineError(ManyLoraError):
    """What the engine answered instead of doing what it was asked."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info

    @property
    def kind(self) -> str:
        """Class name from manylora.errors, messages.UNAVAILABLE, or that of an unforeseen exception."""
        return self.info.kind

    @property
    def retry_after_s(self) -> float | None:
        return self.info.retry_after_s


class EngineClient:
    """One engine process that is ready."""

    def __init__(
        self,
        channel: AsyncChannel[ToApi],
        ready: Ready,
        limits: StreamLimits | None = None,
        *,
        call_timeout_s: float = 60.0,
    ) -> None:
        """To be made in a running event loop.

        Args:
            ready: what has come over the channel so far.
            call_timeout_s: longest that an answer about adapters may take.
        """
        self.model = ready.model
        self.stats: Stats = ready.stats
        """The newest; sent at most four times a second, and when the engine falls idle."""
        self.closed = asyncio.Event()
        """Set when the engine process has closed the pipe, which it does only by ending."""
        self.is_draining = False
        """Whether new requests are refused because the server is about to end."""
        self._channel = channel
        self._limits = limits or StreamLimits()
        self._call_timeout_s = call_timeout_s
        self._streams: dict[str, RequestStream] = {}  # requests of which more is to come
        self._accepting: dict[str, asyncio.Future[None]] = {}  # those not answered for yet
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = count()
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._reading = asyncio.create_task(self._read())

    @property
    def is_alive(self) -> bool:
        """Whether the engine process runs."""
        return not self.closed.is_set()

    async def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: dict[str, Any],
        mixture: Sequence[tuple[str, float]],
        *,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> RequestStream:
        """Hand a request to the engine; returns once it is accepted. See `submit_all`."""
        prompts = {request_id: prompt_token_ids}
        (stream,) = await self.submit_all(prompts, params, mixture, tenant=tenant, deadline_s=deadline_s)
        return stream

    async def submit_all(
        self,
        prompts: Mapping[str, Sequence[int]],
        params: dict[str, Any],
        mixture: Sequence[tuple[str, float]],
        *,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> list[RequestStream]:
        """Hand requests to the engine, which takes all of them or none; returns once they are accepted.

        Args:
            prompts: tokens by request id; an id is unlike that of any other request that has not ended.
            params: fields of SamplingParams by name.
            deadline_s: seconds from now within which the first token has to come; the policy `slo` heeds it.
        Raises:
            EngineError: they were refused, or the engine is gone.
        """
        if self.is_draining:
            raise EngineError(
                ErrorInfo(UNAVAILABLE, "the server is about to end and takes no new requests")
            )
        sent = tuple((request_id, tuple(token_ids)) for request_id, token_ids in prompts.items())
        self._send(Submit(sent, params, tuple(mixture), tenant, deadline_s))
        streams = [
            RequestStream(request_id, params.get("n", 1), self._limits, self._cancel)
            for request_id in prompts
        ]
        # One for all: what is said of the first is true of the others.
        accepted = asyncio.get_running_loop().create_future()
        for stream in streams:
            self._streams[stream.request_id], self._accepting[stream.request_id] = stream, accepted
        self._all_ended.clear()
        try:
            await accepted
        except asyncio.CancelledError:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def names(self) -> list[str]:
        """Return the names of all adapters, sorted; as the roots held them a few seconds ago at most.

        Raises, as all calls about adapters do:
            EngineError: what the engine says against it; UNAVAILABLE if it is gone or takes too long.
        """
        return list(await self._call("names"))

    async def adapter_info(self, name: str) -> dict[str, Any]:
        """Return what is known of an adapter without reading its weights.

        Keys: name, kind ("folder", "remote", "memory"), root (location), num_bytes, identity (None: never read),
        resident, pinned.
        """
        return dict(await self._call("adapter_info", name=name))

    async def load_adapter(self, name: str, path: str | None = None) -> dict[str, Any]:
        """Read and check an adapter, then point `name` at it; returns its `adapter_info`.

        Args:
            path: below a root, relative to it; None: what the roots hold under `name`.
        """
        return dict(await self._call("load_adapter", name=name, path=path))

    async def unload_adapter(self, name: str) -> int:
        """Forget a name at once; when the requests under way with it have ended, return the bytes given back.

        0 if nothing of it was in the pool, or another name needs it.
        """
        return int(await self._call("unload_adapter", name=name))

    async def pin(self, name: str) -> None:
        """Keep an adapter in the pool; returns when it is there."""
        await self._call("pin", name=name)

    async def unpin(self, name: str) -> None:
        """Let an adapter leave the pool when others need the room."""
        await self._call("unpin", name=name)

    async def residency(self) -> list[dict[str, Any]]:
        """Return the adapters in the pool: identity, names, num_bytes, is_ready, is_pinned, num_users."""
        return list(await self._call("residency"))

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those under way; cancel what is left after `timeout_s`."""
        self.is_draining = True
        if await _within(timeout_s, self._all_ended.wait()):
            return
        self.cancel_all()
        await _within(CANCEL_GRACE_S, self._all_ended.wait())

    def cancel_all(self) -> None:
        """Cancel every request under way."""
        for stream in self._streams.values():
            stream.cancel()

    async def close(self) -> None:
        """Close the pipe, by which the engine process ends. What is under way fails."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._channel.close()

    # -- inside

    def _send(self, message: Submit | Call) -> None:
        try:
            if self.closed.is_set():  # the socket itself may still take what nobody will read
                raise ChannelClosed
            self._channel.send(message)
        except ChannelClosed:
            raise EngineError(_GONE) from None

    def _cancel(self, request_id: str) -> None:
        with suppress(ChannelClosed):  # then nothing is left to be cancelled
            self._channel.send(Cancel(request_id))

    async def _call(self, method: str, **args: Any) -> Any:
        call_id = next(self._call_ids)
        self._send(Call(call_id, method, args))
        reply = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._call_timeout_s):
                return await reply
        except TimeoutError:
            message = f"the engine has not answered within {self._call_timeout_s:g} s; it may still do what was asked"
            raise EngineError(ErrorInfo(UNAVAILABLE, message)) from None
        finally:
            del self._calls[call_id]

    async def _read(self) -> None:
        try:
            while True:
                message = await self._channel.receive()
                assert isinstance(message, Step), message
                self._take(message)
        except ChannelClosed:
            pass
        except Exception:
            log.critical("what the engine has sent cannot be taken in", exc_info=True)
        finally:
            self._fail_all()
            self.closed.set()

    def _take(self, step: Step) -> None:
        if step.stats is not None:
            self.stats = step.stats
        for request_id in step.accepted:
            self._accept(request_id)
        for refused in step.refused:
            self._forget(refused.request_id)
            _set_error(self._accepting.pop(refused.request_id), refused.error)
        for chunk in step.chunks:
            # The first step may have been quicker than the word that the request was accepted.
            self._accept(chunk.request_id)
            stream = self._streams[chunk.request_id]
            stream.push(chunk)
            if stream.has_ended:
                self._forget(chunk.request_id)
        for reply in step.replies:
            waiting = self._calls.get(reply.call_id)
            if waiting is None:  # it took too long, or who asked is gone
                continue
            if reply.error is not None:
                _set_error(waiting, reply.error)
            elif not waiting.done():
                waiting.set_result(reply.result)

    def _accept(self, request_id: str) -> None:
        accepted = self._accepting.pop(request_id, None)
        # If it is done, who asked is gone, and it is being cancelled.
        if accepted is not None and not accepted.done():
            accepted.set_result(None)

    def _forget(self, request_id: str) -> None:
        del self._streams[request_id]
        if not self._streams:
            self._all_ended.set()

    def _fail_all(self) -> None:
        for request_id, accepted in self._accepting.items():
            del self._streams[request_id]
            _set_error(accepted, _GONE)
        for stream in self._streams.values():
            stream.fail(_GONE)
        for reply in self._calls.values():
            _set_error(reply, _GONE)
        self._accepting.clear()
        self._streams.clear()
        self._all_ended.set()


_GONE = ErrorInfo(UNAVAILABLE, "the engine has stopped")


def _set_error(future: asyncio.Future[Any], error: ErrorInfo) -> None:
    if not future.done():
        future.set_exception(EngineError(error))


async def _within(timeout_s: float, waiting: Any) -> bool:
    """Whether it came to its end in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await waiting
    except TimeoutError:
        return False
    return True
