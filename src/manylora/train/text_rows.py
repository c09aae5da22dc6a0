"""The rows of a JSONL file: read, checked with file and line, split by content. Knows no tokenizer.

A row is a chat, {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, or
{"prompt": ..., "completion": ...}.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manylora.errors import DataError
from manylora.json_lines import json_lines

Row = dict[str, Any]
ROLES = ("system", "user", "assistant")


def read_rows(path: Path) -> list[Row]:
    """Read and check a JSONL file; blank lines are skipped.

    Raises:
        DataError: no such file, no row, or a malformed row, with its line.
    """
    rows = [_checked_row(row, where) for where, row in json_lines(path)]
    if not rows:
        raise DataError(f"{path} holds no rows; expected one JSON object a line")
    return rows


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into (training, held-out) by the content of each row, so equal rows never stand on both sides."""
    by_content: dict[str, list[Row]] = {}
    for row in rows:
        by_content.setdefault(json.dumps(row, sort_keys=True), []).append(row)
    keys = sorted(by_content)
    random.Random(seed).shuffle(keys)
    num_held_out = max(1, round(len(keys) * fraction))
    if num_held_out >= len(keys):
        raise DataError(
            f"{len(keys)} different rows are too few to hold {fraction:.0%} of them out; give eval_data instead"
        )
    held_out = set(keys[:num_held_out])
    return (
        [row for key, same in by_content.items() if key not in held_out for row in same],
        [row for key, same in by_content.items() if key in held_out for row in same],
    )


def content_hash(rows: Sequence[Row]) -> str:
    """Hex hash of the rows in order; spacing and key order in the file do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _checked_row(row: Row, where: str) -> Row:
    if row.keys() == {"prompt", "completion"}:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str) or not row[key]:
                raise DataError(f"{where}: {key!r} must be a text that is not empty, got {row[key]!r}")
        return row
    if row.keys() == {"messages"}:
        _check_messages(row["messages"], where)
        return row
    raise DataError(
        f"{where}: expected the keys ['messages'] or ['completion', 'prompt'], got {sorted(row)}"
    )


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list that is not empty, got {messages!r}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise DataError(
                f"{where}: message {index} must have exactly 'role' and 'content', got {message!r}"
            )
        if message["role"] not in ROLES:
            raise DataError(
                f"{where}: message {index} has the role {message['role']!r}; known: {list(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise DataError(
                f"{where}: message {index} has content of type {type(message['content']).__name__}, not a text"
            )
    if messages[0]["role"] == "assistant" or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: a chat must begin with a user or system message and end with the assistant's answer"
        )
