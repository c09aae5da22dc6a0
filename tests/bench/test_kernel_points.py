"""`scripts/show_speed.py` on kept records of kernels and steps: a good one passes, a worse one fails, none at all says
what to run."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
US = 1e-6


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The lines of a part that finds its records in a folder of their own, which is `lines.folder`."""

    def of(part: str) -> list[Any]:
        module = importlib.import_module(f"speed_points.{part}")
        for reader in (
            getattr(module, name) for name in ("newest", "newest_tables") if hasattr(module, name)
        ):
            if reader.__kwdefaults__:
                monkeypatch.setitem(reader.__kwdefaults__, "folder", tmp_path)
            else:
                monkeypatch.setattr(reader, "__defaults__", (tmp_path,))
        return list(module.lines())

    of.folder = tmp_path  # type: ignore[attr-defined]
    return of


def kernel_row(kernel: str, shape: str, share: float, **arms: float) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "shape": shape,
        "gb_s": 25.0,
        "gflop_s": 120.0,
        "bandwidth_share": share,
        "reached": 0.9,
        "times": {name: {"median_s": us * US} for name, us in arms.items()},
    }


def kernel_record(
    *, gather: float = 1500, dense: float = 80, few: float = 0.85, lora: float = 0.8, **more: Any
) -> dict[str, Any]:
    rows = [
        kernel_row("lora", "32:32:8", few, ours=100, torch=200, gather=500),
        kernel_row("lora", "128:128:8", lora, ours=100, torch=300),
    ]
    for kernel in ("shrink", "expand"):
        rows.append(kernel_row(kernel, "512:32:64", 0.3, ours=100, torch=200, gather=gather, dense=dense))
        rows.append(kernel_row(kernel, "32:32:8", few, ours=100, torch=200, gather=500, dense=100))
    return {
        "started": "2026-01-01",
        "commit": "abc1234",
        "dirty": False,
        "forced": False,
        "isa": "avx512vnni",
        "threads": 2,
        "command": "manylora bench kernels",
        "config": {"repeats": 5},
        "working_set_bytes": 4000,
        "last_level_cache_bytes": 1000,
        "ceilings": {"memory_read_gb_s": 29.0, "gemm_gflop_s": {"32": 150.0, "128": 250.0, "512": 300.0}},
        "rows": rows,
        **more,
    }


def keep(folder: Path, name: str, record: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(record))


def test_without_records_the_commands_are_told(lines):
    (kernels,) = lines("kernels")
    assert not kernels.ok
    assert "manylora bench kernels --record" in kernels.bound
    steps = lines("steps")
    assert not any(line.ok for line in steps)
    assert {"float32", "int8"} == {
        word for line in steps for word in ("float32", "int8") if word in str(line)
    }


def test_a_good_record_of_kernels_passes(lines):
    keep(lines.folder, "2026-01-01_m_kernels-0.json", kernel_record())
    shown = lines("kernels")
    assert all(line.ok for line in shown)
    assert len(shown) == 1 + 4 + 3 + 1 + 3
    assert "15.0" in shown[1].figure
    assert "80%" in shown[2].figure


@pytest.mark.parametrize(
    ("worse", "failed"),
    [
        ({"gather": 900}, 2),
        ({"dense": 69}, 2),
        ({"few": 0.79}, 3),
        ({"lora": 0.76}, 1),
        ({"forced": True}, 1),
        ({"config": {"repeats": 1}}, 1),
        ({"working_set_bytes": 3000}, 1),
    ],
)
def test_each_bound_of_the_kernels_can_fail(lines, worse, failed):
    keep(lines.folder, "2026-01-01_m_kernels-0.json", kernel_record(**worse))
    assert sum(not line.ok for line in lines("kernels")) == failed


def test_the_newest_record_is_read_and_a_missing_row_fails(lines):
    keep(lines.folder, "2026-01-01_m_kernels-0.json", kernel_record())
    keep(lines.folder, "2026-01-02_m_kernels-0.json", kernel_record(started="2026-01-02", rows=[]))
    assert sum(not line.ok for line in lines("kernels")) == 2 + 3 + 1


def test_a_record_of_other_settings_is_no_answer(lines):
    other = kernel_record(started="2026-01-02", command="manylora bench kernels --kernels shrink", rows=[])
    keep(lines.folder, "2026-01-02_m_kernels-1.json", other)
    assert [line.ok for line in lines("kernels")] == [False]
    keep(lines.folder, "2026-01-01_m_kernels-0.json", kernel_record())
    assert all(line.ok for line in lines("kernels"))


def test_a_busy_machine_tells_nothing_of_steps(lines):
    for dtype in ("float32", "int8"):
        keep(lines.folder, f"2026-01-01_m_steps-{dtype}-0.json", steps_record(0.01, dtype, forced=True))
    assert [line.ok for line in lines("steps")] == [False] * 8


def steps_record(residual: float, dtype: str, *, forced: bool = False) -> dict[str, Any]:
    points = [{"value": n, "step_s": 0.1, "residual": residual if n == 8 else 0.01} for n in (1, 8, 64)]
    table = {"intercept_s": 0.01, "slope_s": 0.001, "largest_residual": abs(residual), "points": points}
    command = "manylora bench steps" + (f" --dtype {dtype}" if dtype != "float32" else "")
    about = {
        "started": "2026-01-01",
        "commit": "abc1234",
        "dirty": False,
        "forced": forced,
        "command": command,
    }
    return {**about, "tables": dict.fromkeys(("batch", "context", "rank"), table)}


def text_row(spent_s: float, dtype: str) -> str:
    part = {"spent_s": 1.0, "floor_s": 0.5, "byte_floor_s": 0.5, "reached": 0.5}
    lora = {"spent_s": spent_s, "floor_s": 1.0, "byte_floor_s": 1.0, "reached": 1 / spent_s}
    text_records = importlib.import_module("speed_points.text_records")
    row = {
        "bench": "text",
        "started": "2026-01-01",
        "commit": "abc1234",
        "dirty": False,
        "forced": False,
        "peers": {},
        "config": {
            **text_records.USUAL,
            "adapters": 128,
            "rank": [8],
            "distribution": "uniform",
            "resident": True,
            "adapter_dtype": {"float32": "auto", "int8": "int8"}[dtype],
            "dtype": dtype,
        },
        "steps": {"decode": {"spent_s": 5.0, "other_s": 1.0, "base": part, "lora": lora, "attention": part}},
    }  # fmt: skip
    return json.dumps(row) + "\n"


@pytest.mark.parametrize(
    ("spent_s", "residual", "failed"), [(1.25, 0.09, 0), (1.35, -0.09, 2), (1.25, -0.11, 6)]
)
def test_steps_are_held_to_their_bytes_and_to_their_lines(lines, spent_s, residual, failed):
    for dtype in ("float32", "int8"):
        keep(lines.folder, f"2026-01-01_m_steps-{dtype}-0.json", steps_record(residual, dtype))
    rows = "".join(text_row(spent_s, dtype) for dtype in ("float32", "int8"))
    (lines.folder / "2026-01-01_m.jsonl").write_text(rows)
    shown = lines("steps")
    assert len(shown) == 2 * (1 + 1) + 2 * 3
    assert sum(not line.ok for line in shown) == failed
