"""`scripts/show_lcm.py` reads kept records: a better LoRA passes, a worse one fails, none at all says its command."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from manylora.bench.image.intervals import Interval
from manylora.bench.image.report import to_json
from manylora.bench.image.rows import ImageRow, close_table, steps_table, sweep_table, universal_table
from manylora.bench.image.table import RowFigures

SCRIPTS = Path(__file__).parents[2] / "scripts"
STYLES = ("paper-cut", "pixel-art", "fluent-emoji", "fluent-emoji-high-contrast", "stained-glass")


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def part(name, package="lcm_points"):
    return importlib.import_module(f"{package}.{name}")


def around(value, half=0.01):
    return Interval(value, value - half, value + half)


def figures_of(row: ImageRow, badness: float) -> RowFigures:
    """Figures that all get worse as badness goes from 0 to 1."""
    return RowFigures(
        row=row,
        kid=around(badness),
        frechet=around(10 * badness),
        frechet_extrapolated=9 * badness,
        accuracy=around(1 - badness),
        accuracy_by_kind={"single": 1 - badness},
        diversity=None,
        paired_rmse=around(badness) if row.is_paired else None,
        look_share=None if row.look is None else around(1 - badness),
        style_accuracy=around(1 - badness),
        seconds_per_picture=0.1,
    )


def kept(folder, table, rows, badness_of, num_pictures=500, **config):
    record = {
        "table": table,
        "started": "2026-01-01T00:00:00+00:00",
        "commit": "abc1234",
        "command": f"manylora bench image --table {table}",
        "config": {"guidance": 2.5, "lcm": "lcm", "styles": list(STYLES), "finetuned": "other"} | config,
        "judge": {"sha256": "0" * 64, "held_out_accuracy": {"single": 0.97}},
        "prompts": {"num_pictures": num_pictures},
        "rows": [to_json(figures_of(row, badness_of(row))) for row in rows],
    }
    (folder / f"2026-01-01_machine_image-{table}.json").write_text(json.dumps(record))


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(part("records"), "RECORDS", tmp_path)  # quality_points read through it as well
    return tmp_path


def badness(lora_at_2, lora_at_4=0.1):
    def of(row):
        if row.lora:
            return {2: lora_at_2, 4: lora_at_4}.get(row.steps, 0.1)
        return {8: 0.3, 4: 0.4, 2: 0.6, 1: 0.9}.get(row.steps, 0.05)

    return of


def verdicts(name, package="lcm_points"):
    return {line.point: line.ok for line in part(name, package).lines()}


def test_a_better_lora_passes_at_every_point(records):
    kept(records, "sweep", sweep_table([1.0, 2.5, 4.0]), lambda row: 0.1 * abs(row.guidance - 2.5))
    kept(records, "steps", steps_table(2.5, "lcm"), badness(0.2))
    found = verdicts("steps")
    assert all(found.values())
    # Both step counts; three samplers unguided, guided at equal calls and at twice, and LCM's own; three metrics.
    assert sum(" / " in point and "steps, LCM-LoRA" in point for point in found) == 2 * 10 * 3


def test_a_lora_that_is_no_better_fails_where_it_must(records):
    kept(records, "sweep", sweep_table([1.0, 2.5, 4.0]), lambda row: 0.1 * abs(row.guidance - 2.5))
    kept(records, "steps", steps_table(2.5, "lcm"), badness(0.595, lora_at_4=0.405))
    found = verdicts("steps")
    # Its intervals touch the others': at 2 steps it must be ahead, at 4 it must not be behind.
    compared = {
        point: ok for point, ok in found.items() if "steps, LCM-LoRA" in point and "guidance" not in point
    }
    assert not any(
        ok for point, ok in compared.items() if point.startswith("2 steps") and "frechet" not in point
    )
    assert all(
        ok for point, ok in compared.items() if point.startswith("4 steps") and "frechet" not in point
    )
    assert not found["LCM-LoRA at 4 / teacher at 32: prompt accuracy"]


def test_guided_samplers_are_compared_at_equal_unet_calls(records):
    """One guided step takes the calls of two unguided ones. Of two guided ones a figure is told and bounds nothing."""
    kept(records, "steps", steps_table(2.5, "lcm"), badness(0.7))
    lines = {line.point: line for line in part("steps").lines()}
    assert lines["2 steps, LCM-LoRA / ddim, 1 step, guidance 2.5: kid"].ok  # 0.7 / 0.9
    assert not lines["2 steps, LCM-LoRA / ddim, 2 steps, unguided: kid"].ok  # 0.7 / 0.6
    at_twice = lines["2 steps, LCM-LoRA / ddim, 2 steps, guidance 2.5: kid"]
    assert "twice the UNet calls" in at_twice.bound


def test_a_guidance_that_is_not_the_best_fails(records):
    kept(records, "sweep", sweep_table([1.0, 2.5, 4.0]), lambda row: 0.1 * abs(row.guidance - 4.0))
    kept(records, "steps", steps_table(2.5, "lcm"), badness(0.2))
    assert not verdicts("steps")["guidance 2.5 of the teacher: KID x 1000 at 32 steps"]


def test_too_few_pictures_are_no_evidence(records):
    kept(records, "steps", steps_table(2.5, "lcm"), badness(0.2), num_pictures=499)
    assert [ok for point, ok in verdicts("steps").items() if point.startswith("steps: 2026")] == [False]


def test_a_missing_record_says_how_to_make_it(records):
    for name in ("steps", "universal"):
        found = list(part(name).lines())
        assert found
        for line in found:
            assert not line.ok
            assert "manylora bench image --table" in line.bound


@pytest.mark.parametrize(("with_lora", "is_kept"), [(0.12, True), (0.3, False)])
def test_styles_are_kept_or_not(records, with_lora, is_kept):
    rows = universal_table(2.5, "lcm", STYLES, "other", "fluent-emoji", [("phased-4", 4)])
    fast = ("lcm", "phased-4")
    kept(
        records,
        "universal",
        rows,
        lambda row: with_lora if any(name in row.lora for name in fast) else 0.05,
        phased=["phased-4"],
    )
    found = verdicts("universal")
    assert found["styles that the base has not seen"]
    judged = [ok for point, ok in found.items() if "/ alone at 32" in point]
    assert (
        judged == [is_kept] * 22
    )  # style and prompt of five styles beside two LoRAs, and of the other base


def test_styles_without_a_phased_lora_are_not_shown(records):
    rows = universal_table(2.5, "lcm", STYLES, "other", "fluent-emoji")
    kept(records, "universal", rows, lambda row: 0.05, phased=[])
    assert not verdicts("universal")["a LoRA distilled by phases beside styles"]


def test_rows_that_lie_near_each_other_are_read_from_the_record_of_more_pictures(records):
    phased = [("phased-4", 4), ("phased-2", 2), ("phased-1", 1)]

    def of(badness_at_4):
        near = {"dpm-solver++": badness_at_4 + 0.015, "unipc": badness_at_4 + 0.015}
        return lambda row: (
            near[row.sampler]
            if row.steps == 4 and row.guidance == 2.5 and row.sampler in near
            else badness(0.1, badness_at_4)(row)
        )

    kept(records, "steps", steps_table(2.5, "lcm", phased), of(0.15))
    few = verdicts("few_steps", "quality_points")
    behind = [
        point for point, ok in few.items() if not ok and "full" not in point and "all weights" not in point
    ]
    apart = [
        f"4 steps: KID x 1000 against {name}, guidance 2.5, twice the calls"
        for name in ("dpm-solver++", "unipc")
    ]
    above = "4 steps: KID x 1000 above the teacher's at 32"  # 0.1 of 0.35
    assert set(behind) == {
        *apart,
        above,
        "4 steps, with more pictures",
        "1 step: the second objective / LCM, KID x 1000",
    }
    rows = close_table(2.5, phased[:1])
    assert {row.steps for row in rows if row.steps != 32} == {4}
    kept(
        records,
        "close",
        rows,
        lambda row: 0.3 if row.sampler in ("dpm-solver++", "unipc") else of(0.1)(row),
        num_pictures=5000,
    )
    more = verdicts("few_steps", "quality_points")
    assert all(more[point] for point in (*apart, above))
    unguided = "4 steps: KID x 1000 against unipc, unguided"
    assert more[unguided] == few[unguided]


def test_a_group_of_which_nothing_ran_has_failed():
    (line,) = importlib.import_module("tested").tested(
        {"none": ["tests/bench/test_image_points.py", "-k", "no_such_test"]}
    )
    assert not line.ok
