"""The benchmark from end to end: against a server that runs already, and with `manylora serve` itself."""

import io
import json
import time
import urllib.error
from dataclasses import replace

import msgspec
import psutil
import pytest
from PIL import Image
from rich.console import Console

from manylora.bench import records
from manylora.bench.serve import command as serve_command
from manylora.bench.serve import run as serve
from manylora.bench.serve.config import ServeBenchConfig
from manylora.bench.serve.generator import generate
from manylora.bench.serve.job import Outcome
from manylora.bench.serve.journal import JOURNAL_FILE, Kept, finish
from manylora.bench.serve.metrics import EngineCounts, MetricsWatch, parse_metrics
from manylora.bench.serve.plots import cumulative, mean_by_adapter, windows_of
from manylora.bench.serve.report import hog_effect, print_result
from manylora.bench.serve.result import Explained, command_line, told
from manylora.bench.serve.run import Measured, measure, plan_runs
from manylora.bench.serve.server import running_server, started_server
from manylora.errors import ConfigError
from manylora.models.tiny import save_tiny
from tests.bench.openai_double import FIRST_TOKEN_S, TOKEN_S, openai_double

NAMES = """bench kind capacity_per_s rows explained config command commit dirty started machine forced""".split()
ROW_NAMES = ["run", "figures", "engine", "others", "started", "commit", "dirty", "forced"]
RUN_NAMES = ["policy", "adapters", "load", "rate", "without_hog"]
FIGURE_NAMES = """requests finished refused_429 refused_503 cut_off failed wall_s requests_per_s tokens_per_s ttft
    tpot attainment attainment_interval satisfaction fairness_adapters fairness_tenants tenants errors
    generator_us_per_token generator_cores late_p99_s""".split()
KEY = "sk-secret"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def double():
    with openai_double() as double:
        yield double


def config_of(model, **settings) -> ServeBenchConfig:
    values = dict(
        model=model,
        adapters=3,
        input_range=(2, 5),
        output_range=(3, 6),
        duration_s=1.0,
        capacity_s=0.9,
        concurrency=5,
        slo_s=0.5,
        force=True,
        record=False,
    )
    return ServeBenchConfig(**(values | settings))


@pytest.fixture(scope="module")
def measured(model, double) -> Measured:
    config = config_of(model, url=double.url, load=(0.5, 1.0), api_key=(KEY,), duration_s=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "check_idle", lambda force: False)
        return measure(config)


# -- a server that runs already


def test_the_capacity_is_what_a_closed_loop_gets(measured):
    request_s = FIRST_TOKEN_S + 4 * TOKEN_S  # tokens are 3 to 5
    assert 0.01 < measured.result.capacity_per_s / (5 / request_s) < 1.1  # the machine may be busy


def test_each_load_is_a_share_of_the_capacity_and_is_measured(measured, double):
    result = measured.result
    assert [row.run.load for row in result.rows] == [0.5, 1.0]
    for row, outcomes in zip(result.rows, measured.outcomes, strict=True):
        assert row.run.rate == pytest.approx(row.run.load * result.capacity_per_s)
        assert row.figures.requests == len(outcomes) == int(2 * row.run.rate)
        assert row.figures.finished == len(outcomes) > 0
        assert {outcome.adapter for outcome in outcomes} <= {0, 1, 2}
        assert row.engine is not None
        assert row.engine.steps == len(outcomes)
    assert {body["model"] for body in double.bodies} == {"adapter-a", "adapter-b", "adapter-c"}
    assert set(double.keys) == {f"Bearer {KEY}"}


def test_the_names_of_a_record_are_frozen(measured):
    values = measured.result.to_json()
    assert sorted(values) == sorted(NAMES)
    assert sorted(values["rows"][0]) == sorted(ROW_NAMES)
    assert sorted(values["rows"][0]["run"]) == sorted(RUN_NAMES)
    assert sorted(values["rows"][0]["figures"]) == sorted(FIGURE_NAMES)


def test_a_record_names_no_key_and_no_place(measured, model):
    text = json.dumps(measured.result.to_json())
    assert KEY not in text
    assert model not in text
    assert "127.0.0.1" not in text
    assert told(measured.result.config)["model"] == "tiny"


def test_the_command_of_a_record_measures_it_again(measured):
    command = command_line(replace(measured.result.config, url="", api_key=()))
    assert command == (
        "manylora bench serve --model tiny --adapters 3 --load 0.5,1.0 --duration-s 2.0 --input-range 2,5 "
        "--output-range 3,6 --slo-s 0.5 --capacity-s 0.9 --concurrency 5"
    )
    assert not set(command.split()) & {"--force", "--record", "--out"}


def test_the_command_prints_writes_and_keeps(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(records, "records_folder", lambda: tmp_path / "records")
    config = replace(measured.result.config, record=True, out=tmp_path / "out")
    monkeypatch.setattr(
        serve_command,
        "measure",
        lambda config, say: Measured(replace(measured.result, config=config), measured.outcomes),
    )
    serve_command.bench_serve(config)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["kind"] == "policies"
    for word in ("in time", "capacity:", "load generator:", "0.5x"):
        assert word in "\n".join(lines[:-1])
    (kept,) = (tmp_path / "records").glob("*_serve-policies-3-*.json")
    assert json.loads(kept.read_text()) == record
    other = replace(measured.result, config=replace(config, duration_s=3.0))
    assert serve_command.record_file(other, kept.parent) != kept, "it would be overwritten"
    assert serve_command.record_file(replace(measured.result, config=config), kept.parent) == kept
    outcomes = [json.loads(line) for line in (tmp_path / "out" / "outcomes.jsonl").read_text().splitlines()]
    assert [one["run"] for one in outcomes].count(0) == len(measured.outcomes[0])
    assert outcomes[0]["num_tokens"] == outcomes[0]["asked_tokens"]
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width > 1000
    serve_command.bench_serve(replace(config, json=True, record=False, out=None))
    assert json.loads(capsys.readouterr().out)["bench"] == "serve"


def test_a_record_can_only_be_kept_in_a_repository(monkeypatch):
    monkeypatch.setattr(records, "records_folder", lambda: None)
    with pytest.raises(ConfigError, match="leave out --record"):
        serve_command.bench_serve(ServeBenchConfig(model="m", record=True))


def test_an_interrupted_measurement_goes_on_where_it_stopped(model, double, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "check_idle", lambda force: False)
    config = config_of(model, url=double.url, load=(0.5, 1.0), api_key=(KEY,), out=tmp_path / "out")

    jobs: list[object] = []

    def interrupt(job):
        jobs.append(job)
        if len(jobs) == 3:  # the closed loop and one run are done
            raise KeyboardInterrupt
        return generate(job)

    with monkeypatch.context() as patch:
        patch.setattr(serve, "generate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure(config)
    journal = tmp_path / "out" / JOURNAL_FILE
    before = journal.read_bytes()
    assert [*before.splitlines()[1]][:11] == [*b'{"capacity"']
    journal.write_bytes(before + b'{"run":{"row":{"r')  # as a kill leaves it
    with pytest.raises(ConfigError, match=r"other settings: seed 42 there, 7 now\. Finish that one"):
        measure(replace(config, seed=7))
    said: list[str] = []
    num_asked = len(double.bodies)
    result = measure(replace(config, force=False), said.append).result
    assert "1 of 2 runs are there from before" in said
    first, second = result.rows
    assert len(double.bodies) - num_asked == second.figures.requests
    assert json.loads(before.splitlines()[1])["capacity"]["per_s"] == result.capacity_per_s
    assert first.figures == msgspec.convert(json.loads(before.splitlines()[2])["run"], Kept).row.figures
    assert (result.started, result.commit) == (first.started, second.commit)
    finish(tmp_path / "out")
    assert not journal.exists()


def test_who_has_no_token_long_after_the_end_is_cut_off_as_a_miss(model, tmp_path):
    # One at a time, many answers' time beyond what the trace lasts.
    options = dict(serve_options="--max-num-seqs 1", output_range=(200, 201), drain_s=0.3, slo_s=0.3)
    config = config_of(model, rate=(60.0,), adapters_folder=tmp_path, **options)
    (row,) = measure(config).result.rows
    figures = row.figures
    assert figures.cut_off > 10
    assert figures.failed == 0
    assert figures.finished + figures.cut_off == figures.requests
    assert figures.attainment <= figures.finished / figures.requests
    with pytest.raises(ConfigError, match=r"this is .*'seed': 7"):
        measure(replace(config, seed=7))
    with pytest.raises(ConfigError, match="drain_s must be at least slo_s"):
        replace(config, drain_s=0.2)


def test_tenants_are_measured_with_the_hog_and_without(model, double):
    config = config_of(model, url=double.url, tenants=3, hog=4.0, rate=(18.0,), duration_s=1.5)
    result = measure(config).result
    assert result.kind == "tenants"
    both, alone = result.rows
    assert (both.run.without_hog, alone.run.without_hog) == (False, True)
    assert [tenant.requests for tenant in both.figures.tenants] == [18, 4, 4]
    assert [tenant.tenant for tenant in alone.figures.tenants] == [1, 2]
    assert both.figures.fairness_tenants is not None
    effect = hog_effect(result, "")
    assert [tenant for tenant, _, _ in effect] == [1, 2]
    assert all(0.05 < with_hog / without < 20 for _, with_hog, without in effect)
    console = Console(width=180, record=True, file=io.StringIO())
    print_result(result, console)
    text = console.export_text()
    for word in ("worst tenant", "without the hog", "sends 4 times as much"):
        assert word in text


def test_what_a_running_server_lacks(double):
    with pytest.raises(ConfigError, match="offers 1 base models and 3 adapters; a base and 9 adapters"):
        running_server(double.url, (), 1, 9)
    with pytest.raises(ConfigError, match="does not answer as OpenAI's API does"):
        running_server("http://127.0.0.1:9", (), 1, 0)
    server = running_server(double.url + "/v1/", ("a", "b"), 2, 2)
    assert (server.url, server.keys, server.adapters) == (
        double.url,
        ("a", "b"),
        ("adapter-a", "adapter-b"),
    )
    assert running_server(double.url, ("a",), 3, 0).keys == ("a", "a", "a")


# -- plans, metrics, curves


def test_the_runs_of_each_kind():
    policies = plan_runs(ServeBenchConfig(model="m", policies=("fcfs", "slo"), load=(0.5, 2.0)), 3.0)
    assert [(run.policy, run.rate) for run in policies] == [
        ("fcfs", 1.5),
        ("fcfs", 6.0),
        ("slo", 1.5),
        ("slo", 6.0),
    ]
    curve = plan_runs(ServeBenchConfig(model="m", rows=(0, 7)), 3.0)
    assert [(run.adapters, run.rate) for run in curve] == [(0, 3.0), (7, 3.0)]
    rates = plan_runs(ServeBenchConfig(model="m", rate=(0.25,)), None)
    assert [(run.load, run.rate, run.label) for run in rates] == [
        (None, 0.25, "server, 200 adapters, 0.25/s")
    ]


def scrape(steps: float, running: float, distinct: float) -> dict[str, float]:
    names = ("adapter_loads", "adapter_hits", "adapter_evictions", "preemptions")
    return {
        "manylora_steps_total": steps,
        "manylora_step_seconds_total": 0.2 * steps,
        "manylora_requests_running": running,
        "manylora_step_adapters": distinct,
        **{f"manylora_{name}_total": 2 * steps for name in names},
    }


def test_what_the_engine_did_lies_between_two_scrapes():
    counts = EngineCounts.of([scrape(10, 0, 0), scrape(12, 3, 5), scrape(17, 3, 7), scrape(20, 0, 7)])
    assert counts.steps == 10
    assert counts.step_s == pytest.approx(0.2)
    assert counts.distinct_adapters_per_step == 6  # of the two that found it at work
    assert counts.adapter_loads == counts.preemptions == 20
    idle = EngineCounts.of([scrape(1, 0, 0), scrape(1, 0, 0)])
    assert (idle.steps, idle.step_s, idle.distinct_adapters_per_step) == (0, None, None)


def test_metrics_are_scraped_meanwhile_and_a_missed_scrape_is_no_harm():
    reads: list[int] = []

    def read() -> dict[str, float]:
        reads.append(len(reads))
        if len(reads) == 3:
            raise urllib.error.URLError("busy")
        return scrape(len(reads), 1, 4)

    with MetricsWatch(read, interval_s=0.01) as watch:
        while len(reads) < 6:
            time.sleep(0.01)
    assert watch.counts.steps == len(reads) - 1
    assert watch.counts.distinct_adapters_per_step == 4


def test_series_with_labels_are_left_out():
    text = '# TYPE a counter\na_total 3\nb{kind="x"} 4\n# HELP c what\n# TYPE c gauge\nc 1.5\n'
    assert parse_metrics(text) == {"a_total": 3, "c": 1.5}


def test_reading_adapters_explains_so_much_of_a_step():
    explained = Explained(memory_read_gb_s=10.0, adapter_bytes=5_000_000)
    assert explained.read_s(20) == pytest.approx(0.01)


def outcome(planned_s: float, ttft_s: float | None, adapter: int = 0) -> Outcome:
    first_s = None if ttft_s is None else planned_s + ttft_s
    return Outcome(0, adapter, 1, 1, planned_s, planned_s, first_s, first_s)


def test_what_the_plots_draw():
    outcomes = [
        outcome(0.0, 2.0),
        outcome(5.0, None),
        outcome(10.0, 1.0, adapter=1),
        outcome(9.9, 3.0, adapter=1),
    ]
    windows = windows_of(outcomes)
    assert [len(own) for _, own in windows] == [1, 1, 2]
    assert [middle for middle, _ in windows] == pytest.approx([0.25, 5.25, 9.75])
    latencies, shares = cumulative(outcomes)
    assert latencies == pytest.approx([1.0, 2.0, 3.0])
    assert shares == [0.25, 0.5, 0.75]  # of all: one has none
    assert mean_by_adapter(outcomes) == pytest.approx([2.0, 2.0])


# -- `manylora serve` itself


@pytest.mark.timeout(900)
def test_a_server_is_started_measured_and_ended(model):
    before = set(psutil.Process().children(recursive=True))
    config = config_of(model, rank=(2, 3), policies=("abort",), rate=(10.0,), slo_s=60.0)
    (row,) = measure(config).result.rows
    assert row.run.policy == "abort"
    assert row.figures.errors == {}
    assert row.figures.finished == row.figures.requests == 10
    assert row.figures.attainment == 1
    assert row.engine is not None
    assert row.engine.steps > 3
    assert 0 < row.engine.adapter_loads <= 3
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.timeout(900)
def test_a_server_that_does_not_start_says_why(model, tmp_path):
    with pytest.raises(RuntimeError, match="ended with code") as caught:
        with started_server(model, tmp_path, [], 1, ["--policy", "nobody"]):
            pass
    assert "nobody" in "".join(caught.value.__notes__)
