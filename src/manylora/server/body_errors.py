"""What is wrong with a body, said in one sentence that names the field: from pydantic's errors to ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from manylora.server.api_errors import ApiError
from manylora.server.protocol import UNSUPPORTED

MAX_SHOWN = 100
"""Characters of a wrong value that a message repeats."""

_Path = list[str | int]


def invalid(errors: Sequence[Any], body: Any) -> ApiError:
    """The answer to a body that does not follow its model: 400, about the first field at fault.

    Args:
        errors: pydantic's, at least one.
        body: what came.
    """
    paths = [_path(error, body) for error in errors]
    # A field that may have several types has an error for each.
    of_first = [error for error, path in zip(errors, paths, strict=True) if path[:1] == paths[0][:1]]
    path = _common([path for path in paths if path[:1] == paths[0][:1]])
    param = ".".join(map(str, path)) or None
    if path and path[-1] in UNSUPPORTED and errors[0]["type"] != "unknown_field":
        return ApiError(400, f"`{param}` is not supported by this server; leave it out", param=param)
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in of_first))
    got = "" if of_first[0]["type"] in ("missing", "unknown_field") else f", got {_shown(_at(path, body))}"
    return ApiError(400, f"{f'`{param}`' if param else 'the body'}: {wanted}{got}", param=param)


def _common(paths: Sequence[_Path]) -> _Path:
    columns = zip(*paths, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


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
    return (
        message.removeprefix("Value error, ")
        .replace("Input should be", "expected")
        .replace("Field ", "field ")
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}.."
