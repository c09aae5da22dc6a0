"""The first token of an adapter never read: measured for what it is, and shown where it is slow."""

import json
from typing import Any

import pytest
import torch

from manylora.bench import records
from manylora.bench.first_token import command as first_token_command
from manylora.bench.first_token import run as first_token
from manylora.bench.first_token.config import FirstTokenConfig
from manylora.bench.steptime import SlowLibrary
from manylora.errors import ConfigError
from manylora.models.adapter_pages import AdapterPages

CONFIG: dict[str, Any] = dict(
    samples=6, rank=2, prompt_tokens=5, in_pool=3, threads=1, force=True, record=False
)

NAMES = """bench cold warm p50_ratio p99_ratio adapter_bytes adapter_loads adapter_evictions commit dirty started
    config machine load forced""".split()


@pytest.fixture(scope="module")
def result(tiny_model):
    return first_token.run(FirstTokenConfig(model=tiny_model, **CONFIG))


def test_every_cold_request_loads_and_makes_another_adapter_go(result):
    assert result.adapter_loads == 6
    assert abs(result.adapter_evictions - 6) <= 1


def test_the_figures_belong_together(result):
    for waits in (result.cold, result.warm):
        assert 0 < waits.p50_s <= waits.p90_s <= waits.p99_s <= waits.max_s
    assert result.p50_ratio == pytest.approx(result.cold.p50_s / result.warm.p50_s)
    assert result.p99_ratio == pytest.approx(result.cold.p99_s / result.warm.p99_s)


def test_adapters_may_be_rounded(tiny_model, monkeypatch):
    seen = []
    layout = AdapterPages.layout

    def watched(self, adapter):
        seen.append(self.row_dtype)
        return layout(self, adapter)

    monkeypatch.setattr(AdapterPages, "layout", watched)
    first_token.run(FirstTokenConfig(model=tiny_model, adapter_dtype="int8", **(CONFIG | {"samples": 2})))
    assert set(seen) == {torch.int8}


def test_slow_reading_shows_in_cold_requests_alone(result, tiny_model, monkeypatch):
    class Slow(SlowLibrary):
        def __init__(self, root) -> None:
            super().__init__(root)
            self.delay_s = 0.4

    monkeypatch.setattr(first_token, "Library", Slow)
    slow = first_token.run(FirstTokenConfig(model=tiny_model, **(CONFIG | {"samples": 2, "in_pool": 1})))
    assert slow.cold.p50_s > 0.4
    assert slow.warm.p50_s < 0.4
    assert slow.p50_ratio > result.p50_ratio


def test_the_names_of_a_record_are_frozen_and_no_path_is_in_it(result, tiny_model):
    assert sorted(result.to_json()) == sorted(NAMES)
    assert tiny_model not in json.dumps(result.to_json())


def test_a_record_is_kept_by_day_machine_and_dtype(result, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(first_token_command, "run", lambda config, report: result)
    monkeypatch.setattr(records, "records_folder", lambda: tmp_path)
    first_token_command.bench_first_token(FirstTokenConfig(model="m"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(records, "should_record", lambda _: True)
    first_token_command.bench_first_token(FirstTokenConfig(model="m"))
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(f"{result.started[:10]}_{result.machine.slug}_first-token-float32-")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(file.read_text()) == json.loads(lines[-1]) == result.to_json()
    assert any("never read" in line for line in lines)


def test_settings_that_cannot_be_measured_are_refused():
    with pytest.raises(ConfigError, match="samples must be at least 1, got 0"):
        FirstTokenConfig(model="m", samples=0)
    with pytest.raises(ConfigError, match="unknown dtype 'int4'"):
        FirstTokenConfig(model="m", dtype="int4")
    with pytest.raises(ConfigError, match="unknown adapter_dtype 'int4'; known: auto, int8"):
        FirstTokenConfig(model="m", adapter_dtype="int4")
