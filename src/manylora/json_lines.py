"""JSONL files: one JSON object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manylora.errors import DataError


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file, each with its place, "FILE, line N", for messages. Blank lines are skipped.

    Raises:
        DataError: it cannot be read, is not in UTF-8, or a line holds no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    # Not splitlines(): a JSON text may hold other ends of lines, U+2028 for one.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(line, where)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half a character, "\\ud83d", is no text
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row
