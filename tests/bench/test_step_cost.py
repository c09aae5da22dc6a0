"""The step-cost model counts what a step does, finds the costs that times were made of, and says where it is off."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from manylora.bench.steps.config import Point
from manylora.bench.steps.cost import StepCost, StepWork, model_of, sizes_of
from manylora.models.config import LlamaConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIZES = {
    "name": "small",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}
COST = StepCost(
    layers=2e-4, weights=4e-11, products=4e-12, rank_rows=5e-11, kv=6e-11, pages=3e-8, sequences=1e-5
)
POINTS = [Point(batch, 64, 8) for batch in (1, 2, 4, 8, 16, 32, 64, 128)]
POINTS += [Point(8, context, 8) for context in (128, 512, 2048)]
POINTS += [Point(8, 64, rank) for rank in (4, 32, 128)]


@pytest.fixture
def step_cost(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("step_cost")
    for name in ("step_cost", "points", "tested", "speed_points"):
        sys.modules.pop(name, None)


def sized(name: str, **changes: int) -> LlamaConfig:
    return model_of({**SIZES, "name": name, **changes})


MODELS = (
    sized("small"),
    sized("wide", hidden_size=512, intermediate_size=1024, num_layers=2),
    sized("random-360m", hidden_size=960, num_layers=32, vocab_size=49_152),
)


def test_a_step_is_counted_by_hand():
    work = StepWork.of(sized("small"), Point(batch=5, context=100, rank=4), "float32", distinct=2)
    # q, k and v as one product, o, gate beside up, down
    layer = (64 + 32 + 32) * 64 + 64 * 64 + 320 * 64 + 64 * 160
    values = 3 * layer + 1000 * 64
    assert work.layers == 3
    assert work.weights == 4 * values
    assert work.products == 5 * 2 * values
    assert work.rank_rows == 2 * 2 * 4 * 3 * (
        (64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 160) + (160 + 64)
    )
    assert work.kv == 5 * 100 * 2 * 3 * 32 * 4
    assert work.sequences == 5
    assert StepWork.of(sized("small"), Point(5, 100, 4), "float32").rank_rows == 2.5 * work.rank_rows


def test_weights_of_eight_bits_are_a_quarter_and_kv_a_half():
    point = Point(2, 10, 1)
    full, eight = (StepWork.of(sized("small"), point, dtype) for dtype in ("float32", "int8"))
    assert (eight.weights, eight.kv) == (full.weights / 4, full.kv / 2)


def test_sizes_go_through_a_record():
    assert model_of(json.loads(json.dumps(sizes_of(MODELS[1])))) == MODELS[1]


def test_a_fit_finds_the_costs_that_times_were_made_of():
    works = [StepWork.of(model, point, "float32") for model in MODELS[:2] for point in POINTS]
    found = StepCost.fit(works, [COST.seconds(work) for work in works])
    assert asdict(found) == pytest.approx(asdict(COST), rel=1e-3)


def test_no_cost_is_below_nothing():
    works = [StepWork.of(MODELS[0], point, "float32") for point in POINTS]
    # Every sequence makes the step faster than the rest would have it.
    times = [COST.seconds(work) - 9e-6 * work.sequences for work in works]
    found = StepCost.fit(works, times)
    assert min(asdict(found).values()) >= 0
    assert all(abs(found.seconds(w) / t - 1) < 0.2 for w, t in zip(works, times, strict=True))


def keep(folder: Path, model: LlamaConfig, factor: float = 1.0) -> None:
    """A record of `bench steps` whose every time is `factor` times what COST makes it."""
    tables = {
        "batch": [point for point in POINTS if (point.context, point.rank) == (64, 8)],
        "context": [point for point in POINTS if (point.batch, point.rank) == (8, 8)],
        "rank": [point for point in POINTS if (point.batch, point.context) == (8, 64)],
    }
    record = {
        "bench": "steps",
        "sizes": sizes_of(model),
        "started": "2026-01-01",
        "commit": "abc",
        "dirty": False,
        "forced": False,
        "command": "manylora bench steps",
        "config": {"at_batch": 8, "at_context": 64, "at_rank": 8},
        "tables": {
            name: {
                "points": [
                    {
                        "value": getattr(point, name),
                        "step_s": factor * COST.seconds(StepWork.of(model, point, "float32")),
                    }
                    for point in points
                ]
            }
            for name, points in tables.items()
        },
    }
    (folder / f"2026-01-01_steps-float32-{model.name}.json").write_text(json.dumps(record))


def test_what_was_held_out_is_told_from_what_was_fitted(step_cost, tmp_path):
    assert step_cost.fit(tmp_path) is None
    for model in MODELS:
        keep(tmp_path, model)
    found = step_cost.fit(tmp_path)
    assert len(found.errors("random-360m")) == len(POINTS)
    assert len(found.errors("small")) == len(POINTS) // 2
    assert max(map(abs, found.errors())) < 1e-3


def test_a_model_that_does_not_hold_fails_its_line(step_cost, tmp_path, monkeypatch):
    scale = importlib.import_module("speed_points.scale")
    for model in MODELS:
        keep(tmp_path, model, factor=1.3 if model.name == "random-360m" else 1.0)
    fit = step_cost.fit
    monkeypatch.setattr(scale.step_cost, "fit", lambda: fit(tmp_path))
    passed = {line.point.split(" of ")[1].split(" that")[0]: line.ok for line in scale.lines()}
    assert passed == {"small": True, "wide": True, "random-360m": False}


def test_the_page_is_filled_between_its_marks(step_cost, tmp_path, monkeypatch):
    for model in MODELS:
        keep(tmp_path, model)
    page = tmp_path / "scaling.md"
    page.write_text(f"before\n{step_cost.BEGIN}\nold\n{step_cost.END}\nafter\n")
    ceilings = {"ceilings": {"memory_read_gb_s": 30.0, "gemm_gflop_s": {"512": 300.0}}}
    monkeypatch.setattr(step_cost.kernels, "newest", lambda folder: ceilings)
    step_cost.main(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| weights | 25 GB/s | 83% |" in text
    assert "| Llama-3-70B | 1 x H100 SXM | does not fit" in text


def test_more_distinct_adapters_cost_what_their_bytes_do(step_cost):
    model = model_of({"name": "8B", **step_cost.MODELS["Llama-3-8B"]})
    machine, reached = (
        step_cost.MACHINES[1],
        step_cost.Shares(weights=1.0, kv=1.0, rank_rows=1.0, products=1.0),
    )
    (none, _), (many, lora) = (step_cost.project(machine, model, reached, n) for n in (0, 128))
    assert many - none == pytest.approx(lora)
    assert lora == pytest.approx(128 * 84e6 / 3350e9, rel=0.01)
