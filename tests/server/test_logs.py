"""Lines of the log say what was said, each on a line of its own."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime
from typing import Any

import pytest

from manylora.server.logs import JsonLines, TextLines


def record(message: str, error: bool = False, **fields: Any) -> logging.LogRecord:
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError:
        info = sys.exc_info() if error else None
    made = logging.LogRecord("manylora.access", logging.INFO, "app.py", 1, message, ("/x",), info)
    made.fields = fields
    return made


def test_a_json_line_is_one_object():
    line = JsonLines().format(record("GET %s", status=200, tenant=None, model="a\nb ü\ud800"))
    assert "\n" not in line
    value = json.loads(line)
    assert datetime.fromisoformat(value.pop("time")).tzinfo is not None
    assert value == {
        "level": "info",
        "logger": "manylora.access",
        "message": "GET /x",
        "status": 200,
        "model": "a\nb ü\ud800",
    }
    assert "ZeroDivisionError: why" in json.loads(JsonLines().format(record("%s", error=True)))["exception"]


def test_a_text_line_cannot_be_forged():
    line = TextLines().format(record("GET %s", model="x\n2026-11-23 info all is well\r"))
    assert line.endswith(r'info GET /x model="x\n2026-11-23 info all is well\r"')
    assert "\n" not in line
    unseen = TextLines().format(
        record("GET %s", model="\x1b[2J\x85\u2028\u202e\x7f\ud800", user="ünïcode/a:1+b")
    )
    assert unseen.endswith(r'model="\x1b[2J\x85\u2028\u202e\x7f\ud800" user=ünïcode/a:1+b')
    assert len(unseen.splitlines()) == 1
    fields = TextLines().format(record("GET %s", model='x" status=200', user=""))
    assert fields.endswith(r"""model="x\" status=200" user="" """.strip())


def test_an_exception_begins_no_line_of_the_log():
    try:
        raise ValueError("x\n2026-11-23 info all is well")
    except ValueError:
        failed = logging.LogRecord("manylora", logging.ERROR, "x.py", 1, "why", (), sys.exc_info())
    first, *rest = TextLines().format(failed).split("\n")
    assert first.endswith("error why")
    assert rest[0].startswith("  Traceback")
    assert rest[-1] == "  2026-11-23 info all is well"
    assert all(line.startswith("  ") for line in rest)


@pytest.mark.parametrize("lines", [JsonLines(), TextLines()])
def test_a_record_without_fields_is_a_line_too(lines):
    plain = logging.LogRecord("uvicorn.error", logging.WARNING, "x.py", 1, "hello", (), None)
    assert "hello" in lines.format(plain)
