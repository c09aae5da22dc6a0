"""The OpenAPI document, true to what is answered: the shapes of answers come from the structs that write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from manylora.server.api_errors import ErrorBody

_REFERENCE = "#/components/schemas/{name}"

ERRORS = {
    400: "The request makes no sense; `param` names the field.",
    401: "No API key, or a wrong one.",
    403: "The API key may not do this.",
    404: "No such model, adapter or path, or none for this API key.",
    405: "The path is there, but not with this method.",
    408: "The body did not come in time, or the answer was not done in time.",
    413: "The body is too large, or the request can never fit in memory.",
    415: "The body is not sent as JSON.",
    429: "Too many requests wait; Retry-After says when to come back.",
    500: "A fault of the server; the message names the request id under which the log has the cause.",
    503: "Not now: the engine is down or draining, an adapter's root does not answer, or a deadline cannot be met.",
}
"""Every status of an error, and what it means."""


def described(
    answer: type | None, *, stream: bool = False, media_type: str = "application/json"
) -> dict[str, Any]:
    """Keyword arguments of a route that say what it answers.

    Args:
        answer: struct of the answer; None: text.
        stream: it may come as server-sent events instead.
    """
    schema = {"type": "string"} if answer is None else {"$ref": _REFERENCE.format(name=answer.__name__)}
    content: dict[str, Any] = {media_type: {"schema": schema}}
    if stream:
        content["text/event-stream"] = {}  # has no one schema: each event is a JSON text
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(name=ErrorBody.__name__)}}}
    responses: dict[int | str, Any] = {
        status: {"description": meaning, "content": error} for status, meaning in ERRORS.items()
    }
    responses[200] = {"description": "Success", "content": content}
    # Named last, so that FastAPI does not add answers of its own shape.
    responses["default"] = {"description": "Any other error.", "content": error}
    return {
        "response_model": None,
        "responses": dict(sorted(responses.items(), key=lambda item: str(item[0]))),
    }


def install(app: FastAPI, answers: Sequence[type], *, asks_for_keys: bool) -> None:
    """Let the app's document hold these structs, and the API key if there is one."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, summary=app.summary, routes=app.routes
            )
            _, components = msgspec.json.schema_components([*answers, ErrorBody], ref_template=_REFERENCE)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(components)
            if asks_for_keys:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
