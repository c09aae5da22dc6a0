"""Errors as HTTP answers, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}. Never FastAPI's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from fastapi import HTTPException
from starlette.responses import Response

from manylora.server.messages import UNAVAILABLE, ErrorInfo

_STATUS = {
    "RequestError": 400,
    "ConfigError": 400,
    "AdapterError": 400,
    "AdapterFormatError": 400,
    "AdapterMismatchError": 400,
    "AdapterNotFoundError": 404,
    "CapacityError": 413,
    "AdapterUnavailableError": 503,
    UNAVAILABLE: 503,
}
"""Status of each kind of error of the engine; what is not listed is a fault of ours: 500."""

_TYPE = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""`type` of the error object; every other status is the client's mistake: invalid_request_error."""


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    """The field of the body that is at fault, with dots into lists and objects."""
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """What every answer other than a success holds."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        retry = {} if retry_after_s is None else {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
        super().__init__(status, message, {**(headers or {}), **retry})
        self.body = ErrorBody(ErrorDetail(message, _TYPE.get(status, "invalid_request_error"), param, code))

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body),
            self.status_code,
            headers=dict(self.headers or {}),
            media_type="application/json",
        )


def from_engine(info: ErrorInfo, *, began: bool, request_id: str, adapters: Sequence[str] = ()) -> ApiError:
    """The answer to a request that the engine refused, or that failed later.

    Args:
        began: it had been accepted. An overloaded engine refuses either at its door, since the queue is full (429: come
            back with less), or later, since the first token cannot come in time (503: another replica may).
        request_id: for the message of an error of ours, whose cause is in the log alone.
        adapters: those that the request names.
    """
    if info.kind == "AdapterNotFoundError":
        return _replaced(adapters) if began else no_such_model(adapters)
    if info.kind == "OverloadedError":
        return ApiError(
            503 if began else 429, info.message, code="overloaded", retry_after_s=info.retry_after_s
        )
    status = _STATUS.get(info.kind, 500)
    if status == 500:
        return internal_error(request_id)
    return ApiError(
        status, info.message, retry_after_s=info.retry_after_s or (1 if status == 503 else None)
    )


def internal_error(request_id: str) -> ApiError:
    """A fault of ours: the client gets the id under which the log has the cause."""
    return ApiError(500, f"internal error; the log has its cause under request id {request_id}")


def _replaced(names: Sequence[str]) -> ApiError:
    """The answer where files changed between the request and their reading: what they hold now was not asked for."""
    listed = " or ".join(f"`{name}`" for name in names)
    message = f"The adapter {listed} was replaced or removed while this request waited for it; send the request again."
    return ApiError(503, message, code="adapter_replaced", retry_after_s=1)


def no_such_model(names: Sequence[str]) -> ApiError:
    """The answer to names of which one is unknown.

    It depends on the names alone: an adapter that another tenant owns and one that does not exist are told in the
    same words, and no near matches are offered, which would tell what others have.
    """
    listed = " or ".join(f"`{name}`" for name in names)
    return ApiError(
        404,
        f"The model {listed} does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )
