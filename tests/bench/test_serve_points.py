"""`scripts/show_server.py` reads kept records: a good one passes, a worse one fails, none at all says its command."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
BESIDE = {"lifo": 0.7, "abort": 0.8}

_COMMON = (
    "manylora bench serve --model smollm2-135m-instruct --rank 8 --capacity-s 30 --input-range 8,32 "
    "--output-range 8,32"
)
COMMANDS = {
    "policies": f"{_COMMON} --adapters N --policies fcfs,cluster,fair,slo,lifo,abort --load 0.5,1.0,2.0 "
    "--duration-s 40.0 --drain-s 6.0 --serve-options '--max-num-seqs 32'",
    "adapters": f"{_COMMON} --rows 0,1,10,100,500,1000,2000 --load 2.0 --duration-s 45.0 --drain-s 6.0 "
    "--serve-options '--max-num-seqs 64'",
    "tenants": f"{_COMMON} --tenants 5 --policies fcfs,fair --load 1.5 --duration-s 90.0 "
    "--serve-options '--max-num-seqs 32'",
}
"""As `manylora bench serve` writes what the figures' scripts ask for: without defaults, and 1 as 1.0."""


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Keep a record where the points look for it."""
    records = importlib.import_module("server_points.records")
    monkeypatch.setattr(records.newest, "__defaults__", (tmp_path,))

    def write(
        kind: str, num_adapters: int, rows: list[dict[str, Any]], day: str = "2026-01-01", **more: Any
    ) -> None:
        record = {
            "started": day,
            "dirty": False,
            "command": COMMANDS[kind].replace("N", str(num_adapters)),
            "rows": [{"commit": "abc1234", **row} for row in rows],
            **more,
        }
        (tmp_path / f"{day}_machine_serve-{kind}-{num_adapters}-0a1b2c3d.json").write_text(
            json.dumps(record)
        )

    return write


def lines(part: str) -> list[Any]:
    return list(importlib.import_module(f"server_points.{part}").lines())


def policy_rows(slo: float) -> list[dict[str, Any]]:
    shares = BESIDE | {"fcfs": 0.3, "cluster": 0.4, "fair": 0.5, "slo": slo}
    return [
        {
            "run": {"policy": policy, "load": load},
            "figures": {
                "attainment": share,
                "attainment_interval": [share - 0.02, share + 0.02],
                "requests": 400,
            },
        }
        for policy, share in shares.items()
        for load in (0.5, 1.0, 2.0)
    ]


def test_without_records_the_commands_are_told(keep):
    for part, script in (("workload", "serve_policies.sh"), ("fairness", "serve_fairness.sh")):
        shown = lines(part)
        assert not any(line.ok for line in shown)
        assert script in shown[0].bound
        assert (SCRIPTS.parent / shown[0].bound.split("`")[1].split()[0]).is_file()


@pytest.mark.parametrize(("slo", "passes"), [(0.81, True), (0.8, True), (0.79, False)])
def test_slo_has_to_reach_the_better_of_the_two_beside(keep, slo, passes):
    for num_adapters in (200, 2000):
        keep("policies", num_adapters, policy_rows(slo), capacity_per_s=4.0)
    shown = [line for line in lines("workload") if "first token within" in line.point]
    assert [line.ok for line in shown] == [passes] * 6
    assert "abort 80.0%" in shown[0].figure
    assert shown[0].bound == "slo >= 80.0%"


@pytest.mark.parametrize(
    ("old", "new"), [("40.0", "10.0"), ("smollm2-135m-instruct", "tiny"), ("--rank 8", "")]
)
def test_a_record_of_other_settings_is_no_record_of_the_figure(keep, old, new):
    keep("policies", 200, policy_rows(0.9), capacity_per_s=4.0)
    assert "first token within" in lines("workload")[1].point
    command = COMMANDS["policies"].replace("N", "200")
    keep("policies", 200, policy_rows(0.9), capacity_per_s=4.0, command=command.replace(old, new))
    assert "serve_policies.sh" in lines("workload")[0].bound


def test_a_policy_that_was_not_run_is_missed(keep):
    keep(
        "policies",
        200,
        [row for row in policy_rows(0.9) if row["run"]["policy"] != "cluster"],
        capacity_per_s=4.0,
    )
    shown = [line for line in lines("workload") if line.point.startswith("200 adapters at")]
    assert len(shown) == 3
    assert not any(line.ok for line in shown)


def test_the_curve_is_told_beside_what_bytes_explain(keep):
    rows = [
        {
            "run": {"adapters": number},
            "figures": {"requests_per_s": 5.0},
            "engine": {"step_s": 0.1 + 0.01 * place, "distinct_adapters_per_step": 10.0 * place},
        }
        for place, number in enumerate((0, 1, 10, 100, 2000))
    ]
    keep("adapters", 2000, rows, explained={"adapter_bytes": 1e7, "memory_read_gb_s": 20.0})
    shown = lines("workload")[2:]
    assert all(line.ok for line in shown)
    assert [line.figure for line in shown[1:3]] == [
        "+10 ms; reading 10 adapters takes 5",
        "+20 ms; reading 20 adapters takes 10",
    ]


def tenant_rows(ratios: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "run": {"policy": policy, "without_hog": without_hog},
            "figures": {
                "fairness_tenants": 0.9,
                "tenants": [
                    {"tenant": 0, "requests": 800, "ttft": {"p95_s": 99.0}},
                    {"tenant": 1, "requests": 80, "ttft": {"p95_s": 1.0}},
                    {"tenant": 2, "requests": 80, "ttft": {"p95_s": 1.0 if without_hog else ratio}},
                ][without_hog:],
            },
        }
        for policy, ratio in ratios.items()
        for without_hog in (False, True)
    ]


@pytest.mark.parametrize(
    ("fcfs", "fair", "oks"),
    [(9.0, 1.5, [True, True]), (9.0, 2.5, [True, False]), (1.0, 1.0, [False, True])],
)
def test_the_tenant_that_suffers_most_counts(keep, fcfs, fair, oks):
    keep("tenants", 200, tenant_rows({"fcfs": 1.0, "fair": 1.0}), day="2025-12-31")  # an older one
    keep("tenants", 200, tenant_rows({"fcfs": fcfs, "fair": fair}))
    shown = lines("fairness")
    assert [line.ok for line in shown] == oks
    assert shown[1].figure.startswith(f"{fair:.2f}x")
