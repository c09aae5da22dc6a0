"""Reading a request's body: bounded in bytes and time, and JSON as RFC 8259 has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

import msgspec
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from manylora.server.api_errors import ApiError
from manylora.server.config import ServerConfig


class BodyRequest(Request):
    """A request whose body is read within the limits of the server's configuration."""

    async def body(self) -> bytes:
        """Return the body.

        Raises:
            ApiError: 408, 413 or 415.
        """
        if not hasattr(self, "_body"):
            _require_json(self.headers.get("content-type", ""))
            config: ServerConfig = self.app.state.service.config
            try:
                async with asyncio.timeout(config.body_timeout_s):
                    self._body = await self._read(config.max_body_bytes)
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not come within {config.body_timeout_s:g} s",
                    headers={"Connection": "close"},
                ) from None
        return self._body

    async def json(self) -> Any:
        """Return the body's value. Refuses NaN, lone surrogates, numbers without bounds and endless nesting."""
        try:
            return msgspec.json.decode(await self.body())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(400, f"the body is no valid JSON: {error}") from None
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None

    async def _read(self, max_bytes: int) -> bytes:
        parts, size = [], 0
        async for part in self.stream():
            size += len(part)
            # What is too much is read all the same: many clients look at no answer before they have sent everything.
            if size <= max_bytes:
                parts.append(part)
        if size > max_bytes:
            raise ApiError(413, f"the body has {size:,} bytes; at most {max_bytes:,} are taken")
        return b"".join(parts)


class BodyRoute(APIRoute):
    """A route whose handler gets a BodyRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(BodyRequest(request.scope, request.receive))

        return handle_bounded


def _require_json(content_type: str) -> None:
    parsed = Message()
    parsed["content-type"] = content_type
    subtype = parsed.get_content_subtype()
    is_json = parsed.get_content_maintype() == "application" and (
        subtype == "json" or subtype.endswith("+json")
    )
    if not content_type or not is_json:
        raise ApiError(
            415, f"send JSON with the header Content-Type: application/json, got {content_type!r}"
        )
