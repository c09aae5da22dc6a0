"""One line of a JSONL file."""

import json
from typing import Any

from manylora.errors import DataError


def json_object(line: str, where: str) -> dict[str, Any]:
    """Return the object that a line holds.

    Args:
        where: file and line, for the message.
    Raises:
        DataError: it holds no JSON, or something else than an object.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row
