"""The API process's side of the pipe: what the HTTP side sees of the engine. One event loop; no torch.

    client = await EngineClient.start(setup, ...)
    async with await client.submit("id-1", tokens, {"max_tokens": 8}, [("pirate", 1.0)]) as stream:
        async for chunk in stream:
            ...
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from manylora.errors import ManyLoraError
from manylora.server.messages import Chunk, ErrorInfo, ModelInfo, Stats


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


class RequestStream:
    """The chunks of one accepted request, until every sample has ended. Leaving `async with` cancels what has not.

    Every sample ends with exactly one chunk that `is_last`, whatever happens: an error of the engine, its death, or a
    reader too slow to keep up come as that chunk's `error`.
    """

    request_id: str

    def cancel(self) -> None:
        """End the request now; its last chunks say "cancelled". No effect on one that has ended."""
        raise NotImplementedError

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Chunk:
        raise NotImplementedError

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class EngineClient:
    """One engine process."""

    model: ModelInfo
    stats: Stats
    """The newest; sent at most four times a second, and when the engine falls idle."""

    @property
    def is_alive(self) -> bool:
        """Whether the engine process runs and answers."""
        raise NotImplementedError

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the server is about to end."""
        raise NotImplementedError

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
        """Hand a request to the engine; returns once it is accepted.

        Args:
            params: fields of SamplingParams by name.
            deadline_s: seconds from now within which the first token has to come; the policy `slo` reads it.
        Raises:
            EngineError: it was refused, or the engine is gone.
        """
        raise NotImplementedError

    async def names(self) -> list[str]:
        """Return the names of all adapters, sorted."""
        raise NotImplementedError

    async def adapter_info(self, name: str) -> dict[str, Any]:
        """Return what is known of an adapter without reading its weights.

        Keys: name, kind ("folder", "remote", "memory"), root (location), num_bytes, identity (None: never read),
        resident, pinned.
        """
        raise NotImplementedError

    async def load_adapter(self, name: str, path: str | None = None) -> dict[str, Any]:
        """Read and check an adapter below a root, then point `name` at it; returns its `adapter_info`.

        Args:
            path: below a root; None: what the roots hold under `name`.
        """
        raise NotImplementedError

    async def unload_adapter(self, name: str) -> None:
        """Forget a name. Requests under way end first; then its pages are free if no other name needs them."""
        raise NotImplementedError

    async def pin(self, name: str) -> None:
        """Keep an adapter in the pool, loading it if need be."""
        raise NotImplementedError

    async def unpin(self, name: str) -> None:
        """Let an adapter leave the pool when others need the room."""
        raise NotImplementedError

    async def residency(self) -> list[dict[str, Any]]:
        """Return the adapters in the pool: names, identity, num_bytes, pinned, num_users."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for those under way; cancel what is left after `timeout_s`."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the engine process."""
        raise NotImplementedError
