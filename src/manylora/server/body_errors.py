"""What is wrong with a body, said in one sentence that names the field: from pydantic's errors to ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from manylora.server.api_errors import ApiError
from manylora.server.unsupported import UNSUPPORTED, UNSUPPORTED_IN_MESSAGES

MAX_SHOWN = 100
"""Characters of a wrong value that a message repeats."""

MAX_LOOKED_AT = 100
"""Errors that are looked at: a list of a million wrong items has as many."""

_Path = list[str | int]


def invalid(errors: Sequence[Any], body: Any) -> ApiError:
    """The answer to a body that does not follow its model: 400, about the first field at fault.

    Args:
        errors: pydantic's, at least one.
        body: what came.
    """
    errors = errors[:MAX_LOOKED_AT]
    paths = [_path(error, body) for error in errors]
    path = paths[0]
    # A field that may have several types has an error for each: about itself, or about what it holds.
    of_field = [error for error, other in zip(errors, paths, strict=True) if other[: len(path)] == path]
    param = ".".join(map(str, path)) or None
    if _is_unsupported(path) and errors[0]["type"] != "unknown_field":
        return ApiError(400, f"`{param}` is not supported by this server; leave it out", param=param)
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in of_field))
    got = (
        "" if errors[0]["type"] in ("missing", "unknown_field") else f", got {_shown(of_field, path, body)}"
    )
    return ApiError(400, f"{f'`{param}`' if param else 'the body'}: {wanted}{got}", param=param)


def _is_unsupported(path: _Path) -> bool:
    match path:
        case ["messages", _, field, *_]:
            return field in UNSUPPORTED_IN_MESSAGES
        case [field, *_]:
            return field in UNSUPPORTED
    return False


def _path(error: Any, body: Any) -> _Path:
    """Where in the body the error lies. pydantic's location also tells which alternative of a type was tried."""
    path: _Path = []
    for part in error["loc"][1:]:
        if _holds(_at(path, body), part):
            path.append(part)
    if error["type"] == "missing" and len(error["loc"]) > 1:
        path.append(error["loc"][-1])
    elif error["type"] == "unknown_field":
        path.append(error["ctx"]["field"])
    return path


def _holds(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _at(path: Iterable[str | int], body: Any) -> Any:
    for part in path:
        body = body[part]
    return body


def _wanted(error: Any) -> str:
    message: str = error["msg"]
    for theirs, ours in _WORDS:
        message = message.replace(theirs, ours)
    return message


_WORDS = (
    ("Value error, ", ""),
    ("Input should be ", "expected "),
    ("Field required", "is required"),
    ("String should", "it should"),
    ("List should", "it should"),
    ("Dictionary should", "it should"),
)
"""From pydantic's words to those of all our errors."""


def _shown(errors: Sequence[Any], path: _Path, body: Any) -> str:
    text = repr(errors[0]["input"] if len(errors) == 1 else _at(path, body))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}.."
