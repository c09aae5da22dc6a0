"""`scripts/mixture_breaks.py` on a tiny base, and its report on sets whose breaking is made up."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manylora import save_adapter
from manylora.bench.image.judge import JudgeNet, JudgeSize, save_judge
from manylora.lora.mixture import Mixture
from manylora.models.diffusion_base import load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd
from tests.bench.test_image_table import NAMES, write_pictures
from tests.image.pictures import random_adapter

SCRIPTS = Path(__file__).parents[2] / "scripts"
LORAS = [f"style-{n}" for n in range(10)]


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_the_path(one_thread):
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def script(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("breaks")
    base = load_diffusion_base(tiny_sd(folder / "base", prediction="v_prediction"))
    for seed, name in enumerate(["lcm", *LORAS]):
        save_adapter(random_adapter(base, seed), folder / "loras" / name, "diffusers")
    write_pictures(folder / "held_out", 8, 0, 0)
    torch.manual_seed(0)
    size = JudgeSize((4, 8, 8, 8))
    save_judge(folder / "judge", JudgeNet(4, 1, size).eval(), size, NAMES, ("base",), {})
    return folder


def arguments(world, file, *more):
    return [
        *("mixture_breaks.py", "--base", world / "base", "--loras", world / "loras", "--names", *LORAS),
        *("--judge", world / "judge", "--prompts", world / "held_out", "--real", world / "held_out"),
        *("--num-pictures", 4, "--data", file, *more),
    ]


def run(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", [*map(str, given)])
    script("mixture_breaks").main()


def test_sets_are_measured_once_and_go_on_where_they_stopped(world, tmp_path, monkeypatch, capsys):
    file = tmp_path / "data" / "breaks.json"
    run(monkeypatch, *arguments(world, file, "--num-sets", 3))
    first = json.loads(file.read_text())
    assert [len(row["weights"]) for row in first["rows"]] == [1, 2, 3]
    row = first["rows"][2]
    assert 0 <= row["good"] <= min(row["accuracy"], row["real"]) <= 1
    assert row["probe"]["reference"] == "lcm:1"
    assert row["summed_norm"] > row["norm"] > 0
    assert row["max_cosine"] > 0
    capsys.readouterr()
    run(monkeypatch, *arguments(world, file, "--num-sets", 4))
    again = json.loads(file.read_text())
    assert again["rows"][:3] == first["rows"]
    assert capsys.readouterr().out.count("good") == 1 + 0, "one set was missing"
    assert len(again["rows"]) == 4


def test_merged_weights_are_put_back_to_the_bit(world):
    base = load_diffusion_base(world / "base")
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    adapters = {"a": random_adapter(base, 1), "b": random_adapter(base, 2, text=True)}
    merged = script("merged_rows").MergedRows(base, adapters)
    mixture = Mixture((("a", 0.3), ("b", 0.7)))
    with merged.rows([Mixture((("b", 1.0),))]):
        pass  # stays merged, and must not be added to what is compared
    assert script("merged_rows").refuse_if_unlike(base, merged, mixture) < 1e-4
    with merged.rows([mixture]):
        assert not torch.equal(base.unet.conv_in.weight, before["conv_in.weight"]) or any(
            not torch.equal(weight, before[name]) for name, weight in base.unet.state_dict().items()
        )
    merged.restore()
    assert all(torch.equal(weight, before[name]) for name, weight in base.unet.state_dict().items())
    merged.adapters["a"] = random_adapter(base, 3)
    with pytest.raises(SystemExit, match="something else"):
        script("merged_rows").refuse_if_unlike(base, Wrong(merged), mixture)


class Wrong:
    """Merges half of what is asked."""

    def __init__(self, merged):
        self.merged, self.adapters = merged, merged.adapters

    def rows(self, mixtures):
        (mixture,) = set(mixtures)
        half = Mixture(tuple((name, weight / 2) for name, weight in mixture.weights))
        return self.merged.rows([half] * len(mixtures))

    def restore(self):
        self.merged.restore()


def test_the_first_sets_are_the_same_however_many_follow():
    cases = script("mixture_breaks").cases
    few, many = list(cases(LORAS, 20)), list(cases(LORAS, 160))
    assert many[:20] == few
    for group in ("fit", "held"):
        sizes = [len(case.mixture.names) for case in many if case.group == group]
        assert sorted(set(sizes)) == list(range(1, 9))
        assert len(sizes) == 80
    assert len({case.key for case in many}) == 160


def made_up(num, seed=0, is_useless=False):
    """Sets that break by what the probe sees, with some noise; norms and numbers know half of it."""
    draw, rows = np.random.default_rng(seed), []
    for n in range(num):
        harm = draw.uniform(0, 1)
        change = {
            "divergence": 0.5 + (draw.uniform(0, 0.8) if is_useless else harm),
            "divergence_by_level": [0.1, 0.2, 0.3, 0.4],
            "prompt_disagreement": draw.uniform(0, 0.6) if is_useless else 0.6 * harm,
            "prompt_gain": 1.0,
            "roughness": 0.1,
            "residual": 0.1,
        }
        rows.append(
            {
                "key": str(n),
                "group": "held" if n % 2 else "fit",
                "weights": {f"style-{i}": 1.0 for i in range(1 + n % 8)},
                "good": max(0.0, 1 - harm + 0.1 * draw.normal()),
                "probe": {
                    "reference": "lcm:1",
                    "num_rows": 32,
                    "timesteps": [999, 759, 499, 259],
                    "reference_residual": 0.1,
                    "mixture": change,
                    "parts": [change],
                    "non_additivity": harm,
                },
                "summed_norm": harm + draw.uniform(0, 1.5),
                "norm": harm,
                "max_relative_norm": harm,
                "max_cosine": draw.uniform(),
                "max_overlap": draw.uniform(),
            }
        )
    return rows


def measured(**settings):
    return script("mixture_breaks_report").Measured({"good": 1.0}, made_up(160, **settings))


def test_the_area_is_how_often_the_broken_are_above():
    area = script("mixture_breaks_report").area
    broken = np.array([True, True, False, False, False])
    figure = np.array([3.0, 1.0, 2.0, 1.0, 0.0])
    # Of six pairs: 3 is above all three, 1 is above one and equal to one.
    assert area(figure, broken, np.ones(5)) == pytest.approx((3 + 1 + 0.5) / 6)
    assert area(figure, broken, np.array([1.0, 0.0, 1.0, 1.0, 1.0])) == 1.0
    assert math.isnan(area(figure, np.zeros(5, dtype=bool), np.ones(5)))


def test_a_verdict_that_sees_is_ahead_of_what_does_not():
    report, found = script("mixture_breaks_report"), measured()
    areas = report.areas(found, "held")
    assert areas[report.VERDICT].low > 0.85
    assert areas["largest cosine of a pair"].low < 0.5 < areas["largest cosine of a pair"].high
    for name in report.PLAIN:
        assert report.ahead(found, name).low > 0
    useless = measured(is_useless=True)
    assert report.areas(useless, "held")[report.VERDICT].low < 0.6
    assert report.ahead(useless, "summed norm of the deltas").value < 0


def test_thresholds_lie_between_the_bad_and_the_others(capsys):
    report = script("mixture_breaks_report")
    values, bad = np.array([0.1, 0.2, 0.3, 0.8, 0.9]), np.array([False, False, True, True, True])
    assert report.best_threshold(values, bad) == pytest.approx(0.25)
    assert math.isnan(report.best_threshold(values, np.zeros(5, dtype=bool)))
    report.print_thresholds(measured())
    line = next(one for one in capsys.readouterr().out.splitlines() if one.startswith("| prompt disag"))
    strained, broken = (float(cell) for cell in line.split("|")[2:4])
    assert 0.05 < strained < broken < 0.25  # 0.6 times a harm of 0.15 and of 0.3


def test_the_report_prints_and_draws(tmp_path, capsys):
    report, found = script("mixture_breaks_report"), measured()
    for number, row in enumerate(row for row in found.rows if row["good"] < 0.7 and row["group"] == "held"):
        row["repair"] = {"factor": 0.5, "good": 0.9 if number % 4 else 0.1, "mends": True, "weights": {}}
    share, rows = report.mended(found)
    assert share.value == pytest.approx(0.75, abs=0.02)
    assert share.low < share.value < share.high
    report.print_tables(found)
    told = capsys.readouterr().out
    for expected in ("held: 80 sets", "number of LoRAs", f"of {len(rows)} broken sets"):
        assert expected in told
    report.draw(found, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.width > 800


def test_quality_points_read_the_rows(tmp_path, monkeypatch):
    part = script("quality_points.diagnosis")
    monkeypatch.setattr(part, "DATA", tmp_path / "none.json")
    assert [line.ok for line in part.lines()] == [False]
    rows = made_up(160)
    for row in rows:
        if row["good"] < 0.7 and row["group"] == "held":
            row["repair"] = {"factor": 0.5, "good": 0.9, "mends": True, "weights": {}}
    file = tmp_path / "breaks.json"
    kept = {"adapters": {name: "" for name in ["lcm", *LORAS]}, "reference": {"good": 1.0}, "rows": rows}
    file.write_text(json.dumps(kept))
    monkeypatch.setattr(part, "DATA", file)
    monkeypatch.setattr(part, "read", lambda: script("mixture_breaks_report").read(file))
    assert all(line.ok for line in part.lines())
    assert len(list(part.lines())) == 2 + 3 + 1
    next(row for row in rows if "repair" in row).pop("repair")
    file.write_text(json.dumps(kept | {"rows": rows}))
    assert [line.ok for line in part.lines()] == [True] * 5 + [False], "an interrupted repair"
    file.write_text(json.dumps(kept | {"rows": made_up(160, is_useless=True)}))
    lines = {line.point: line.ok for line in part.lines()}
    assert not lines["verdict: area under the ROC curve, held-out sets"]
