"""Log lines, for people or one JSON object a line. A record says more in `extra={"fields": {name: value}}`."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal


def configure_logs(log_format: Literal["text", "json"], level: int = logging.INFO) -> None:
    """Send every logger's lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, the fields, and the exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """time level message name=value ...

    What a client sent begins no line, steers no terminal, and passes for no field: a value that is more than one plain
    word stands in quotes, and the lines of an exception are indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        said = [f"{name}={_word(str(value))}" for name, value in _fields(record).items()]
        line = " ".join([_time(record), record.levelname.lower(), _escaped(record.getMessage()), *said])
        if record.exc_info:
            lines = self.formatException(record.exc_info).split("\n")
            line += "".join(f"\n  {_escaped(one)}" for one in lines)
        return line


def _word(value: str) -> str:
    is_plain = value.isprintable() and not set(value) & set(' ="\\')
    return value if value and is_plain else '"' + _escaped(value.replace('"', '\\"')) + '"'


def _escaped(text: str) -> str:
    """As Python would write it in a string literal, where a character is invisible or begins a line."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value is not None}
