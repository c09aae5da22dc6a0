"""The step benchmark from end to end on a tiny model, and its line on times that lie on one."""

import json
from dataclasses import replace

import pytest

from manylora.bench import records
from manylora.bench.adapters import write_adapters
from manylora.bench.settings import command_line
from manylora.bench.steps import command as steps_command
from manylora.bench.steps import run as steps
from manylora.bench.steps.config import Point, StepsConfig
from manylora.bench.steps.fit import StepTable, fit_line
from manylora.bench.steps.result import StepsResult
from manylora.bench.steps.run import time_steps
from manylora.errors import ConfigError
from manylora.lora.library import Library
from manylora.models.loading import load_model
from manylora.models.sites import base_sites

NAMES = """bench tables sizes threads config command commit dirty started machine load forced""".split()


@pytest.fixture(scope="module")
def result(tiny_model) -> StepsResult:
    return steps.run(
        StepsConfig(
            model=tiny_model,
            batch=(1, 2, 3),
            context=(5, 9, 20),
            rank=(1, 2, 7),
            at_batch=2,
            at_context=6,
            at_rank=2,
            steps=4,
            repeats=2,
            threads=1,
            force=True,
            record=False,
        )
    )


def test_every_point_of_every_table_is_timed(result):
    assert {name: [point.value for point in table.points] for name, table in result.tables.items()} == {
        "batch": [1, 2, 3],
        "context": [5, 9, 20],
        "rank": [1, 2, 7],
    }
    for table in result.tables.values():
        for point in table.points:
            assert 0 < point.least_s <= point.step_s <= point.most_s
            assert point.fit_s == pytest.approx(table.intercept_s + table.slope_s * point.value)
        assert table.largest_residual == max(abs(point.residual) for point in table.points)
    # The same point of two tables is one measurement.
    assert result.tables["batch"].points[1].step_s == result.tables["rank"].points[1].step_s


def test_the_names_of_a_row_are_frozen_and_it_names_no_path(result, tiny_model):
    row = json.loads(json.dumps(result.to_json()))
    assert sorted(row) == sorted(NAMES)
    assert tiny_model not in json.dumps(row)
    assert row["command"].startswith("manylora bench steps --model tiny --batch 1,2,3")


def test_the_last_line_is_the_row(result, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(steps_command, "run", lambda config, report: result)
    monkeypatch.setattr(records, "records_folder", lambda: tmp_path)
    steps_command.bench_steps(replace(result.config, record=True))
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == json.loads(json.dumps(result.to_json()))
    assert "a decode step at context 6, rank 2" in "\n".join(lines[:-1])
    assert not list(tmp_path.iterdir()), "the row says record=False"
    monkeypatch.setattr(steps_command, "run", lambda config, report: replace(result, config=config))
    steps_command.bench_steps(replace(result.config, record=True, json=True))
    (file,) = tmp_path.iterdir()
    assert "_steps-float32-" in file.name


def test_the_steps_that_are_timed_have_the_batch_and_context_they_name(tiny_model, tmp_path, monkeypatch):
    model = load_model(tiny_model)
    write_adapters(tmp_path, base_sites(model.config), 3, [2], seed=0)
    seen: list[tuple[int, int, int]] = []

    def note(module, arguments):
        tokens, positions, *_ = arguments
        seen.append((len(tokens), int(positions.min()), int(positions.max())))

    with model.register_forward_pre_hook(note):
        seconds = time_steps(model, Library(tmp_path), Point(3, 10, 2), num_steps=4, seed=0)
    assert len(seconds) == 4
    prefill, *decodes = seen[-5:]
    assert prefill == (3 * 8, 0, 7)
    # Contexts 9, 10, 11, 12: half a step above the 10 that it names.
    assert decodes == [(3, 8, 8), (3, 9, 9), (3, 10, 10), (3, 11, 11)]


def test_times_on_a_line_are_fitted_exactly_and_a_bend_shows():
    assert fit_line([1, 2, 5], [3, 5, 11]) == pytest.approx((1, 2))
    straight = StepTable.of({n: [2.0 + 3 * n, 2.1 + 3 * n, 1.9 + 3 * n] for n in (1, 4, 9)})
    assert (straight.intercept_s, straight.slope_s) == pytest.approx((2, 3))
    assert straight.largest_residual == pytest.approx(0, abs=1e-9)
    bent = StepTable.of({1: [1.0], 2: [1.0], 64: [1.0], 128: [10.0]})
    assert bent.largest_residual > 0.5


def test_each_point_counts_by_its_share():
    """A short step that is off by half weighs more than a long one that is off by a hundredth."""
    intercept, slope = fit_line([1, 10, 100, 1000], [1.5, 10, 100, 1010])
    assert abs((intercept + slope) / 1.5 - 1) < 0.25
    assert abs((intercept + 1000 * slope) / 1010 - 1) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch": (1, 2)},
            r"batch must list three numbers of at least 1, or no line can be told, got \[1, 2\]",
        ),
        ({"rank": (0, 1, 2)}, "rank must list"),
        ({"at_batch": 0}, "at_batch must be at least 1"),
        ({"context": (8, 64, 128)}, "longer than half of the 16 steps"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        StepsConfig(**settings)


def test_a_context_beyond_the_models_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="exceed the 256"):
        steps.run(StepsConfig(model=tiny_model, force=True))
    assert command_line("steps", StepsConfig()) == "manylora bench steps"
