"""Around every request: its id, its API key, its line in the log, and an answer whatever happens."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.server.api_errors import ApiError, internal_error
from manylora.server.service import Context, Service
from manylora.server.tenants import EVERYBODY, Tenant

log = logging.getLogger("manylora.access")

OPEN = frozenset({"/health", "/ready", "/version", "/openapi.json"})
"""Paths that need no API key."""

QUIET = OPEN | {"/metrics"}
"""Paths that machines ask every few seconds; they are logged at the level of debugging."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class _UnreadError(Exception):
    """A client leaves what was sent to it unread."""


class Gate:
    """ASGI middleware, without the queues and tasks of Starlette's base class: it stands in the way of every event."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = Context(_request_id(headers), EVERYBODY)
        scope.setdefault("state", {})["context"] = context
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", context.request_id.encode())]
            try:
                async with asyncio.timeout(self._service.config.client_timeout_s):
                    await send(message)
            except TimeoutError:
                raise _UnreadError from None

        try:
            tenant = self._tenant(scope, headers)
            if isinstance(tenant, ApiError):
                await tenant.response()(scope, receive, send_with_id)
            else:
                context.tenant = tenant
                await self._app(scope, receive, send_with_id)
        except _UnreadError:  # the connection is closed, for its answer has no end
            context.fields["error"] = "the client left its answer unread"
        except Exception as error:
            context.fields["error"] = f"{type(error).__name__}: {error}"
            log.exception("a fault of the server", extra={"fields": {"request_id": context.request_id}})
            if not status:
                await internal_error(context.request_id).response()(scope, receive, send_with_id)
        finally:
            self._record(scope, context, status)

    def _tenant(self, scope: Scope, headers: Headers) -> Tenant | ApiError:
        if scope["path"] in OPEN:
            return EVERYBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        tenant = self._service.tenants.of(key.strip() if scheme.lower() == "bearer" else None)
        return tenant or ApiError(
            401,
            "no API key, or a wrong one; send the header Authorization: Bearer <key>",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _record(self, scope: Scope, context: Context, status: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._service.metrics.http_requests.labels(route, str(status)).inc()
        level = logging.DEBUG if scope["path"] in QUIET and status < 400 else logging.INFO
        fields = {
            "request_id": context.request_id,
            "tenant": context.tenant.name or None,
            "status": status,
            "duration_s": round(time.monotonic() - context.began, 4),
            **context.fields,
        }
        # As it came, so that a space in it begins no field of its own.
        path = quote(scope["path"], safe="/:@!$&'()*+,;=~", errors="replace")
        log.log(level, "%s %s", scope["method"], path, extra={"fields": fields})


def _request_id(headers: Headers) -> str:
    """The client's own id, if it can stand in a log and a header; else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
