"""Who never answers is soon asked no more, until one question finds that there are answers again."""

from __future__ import annotations

import threading
import time

import pytest

from manylora.errors import ConfigError
from manylora.lora.library import Library
from manylora.lora.patience import MAX_LATE, Patience


def test_answers_and_errors_come_through():
    patience = Patience(10)
    assert patience.ask(lambda: 5) == 5

    def fail() -> None:
        raise ZeroDivisionError("why")

    with pytest.raises(ZeroDivisionError, match="why"):
        patience.ask(fail)


def test_few_questions_hang_and_one_finds_out_whether_there_are_answers_again():
    patience, may_answer = Patience(0.05), threading.Event()
    asked: list[int] = []

    def hang() -> None:
        asked.append(1)
        may_answer.wait()

    for _ in range(MAX_LATE + 10):
        with pytest.raises(TimeoutError):
            patience.ask(hang)
    assert MAX_LATE <= len(asked) < MAX_LATE + 10, "some were refused without being asked"
    time.sleep(0.15)
    assert patience.ask(lambda: "again") == "again"
    assert patience.ask(lambda: "at once") == "at once"  # though the old ones still hang
    may_answer.set()


def test_a_patience_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="resolve_timeout_s must be above 0, got 0"):
        Library(tmp_path, resolve_timeout_s=0)
