"""Who never answers is soon asked no more, until one question finds that there are answers again."""

from __future__ import annotations

import threading
import time

import fsspec
import pytest

from manylora.errors import AdapterUnavailableError, ConfigError
from manylora.lora.formats import save_peft
from manylora.lora.library import Library
from manylora.lora.patience import MAX_LATE, Patience
from manylora.models.tiny import tiny_adapter, tiny_config


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
    for limit in ("resolve_timeout_s", "fetch_timeout_s"):
        with pytest.raises(ConfigError, match=f"{limit} must be above 0, got 0"):
            Library(tmp_path, **{limit: 0})  # type: ignore[arg-type]  # which of its settings, mypy cannot know


def test_a_download_that_hangs_is_not_waited_for_and_others_come(tmp_path, monkeypatch):
    far, may_come = fsspec.filesystem("memory"), threading.Event()
    for name in ("hangs", "comes"):
        save_peft(tiny_adapter(tiny_config(), seed=1, name=name), tmp_path / name)
        far.put(str(tmp_path / name), f"/patience/{name}", recursive=True)
    get_file = type(far).get_file

    came: list[str] = []

    def slow(self, remote, local, *args, **options):
        is_held = "hangs" in remote and not may_come.is_set()
        if is_held:
            may_come.wait()
        get_file(self, remote, local, *args, **options)
        if is_held:
            came.append(remote.rpartition("/")[2])

    monkeypatch.setattr(type(far), "get_file", slow)
    library = Library("memory://patience", cache_dir=tmp_path / "cache", fetch_timeout_s=0.5)
    try:
        with pytest.raises(AdapterUnavailableError, match=r"send 'hangs' within 0.5 s \(fetch_timeout_s\)"):
            library.load("hangs")
        here = Library(tmp_path)
        assert library.load("comes").identity == here.load("comes").identity
    finally:
        may_come.set()
    assert library.load("hangs").identity == here.load("hangs").identity
    for _ in range(500):  # what hung has come by now, and is thrown away
        if came == ["adapter_config.json"] and not list((tmp_path / "cache").glob(".partial-*")):
            break
        time.sleep(0.01)
    assert came == ["adapter_config.json"], "and after it nothing more"
    assert not list((tmp_path / "cache").glob(".partial-*"))
