"""The kernel benchmark from end to end, on a tiny model; its arithmetic on figures that a reader can check."""

import json
from dataclasses import replace

import pytest
import torch

from manylora.bench import records
from manylora.bench.ceilings import Ceilings
from manylora.bench.kernels import command as kernels_command
from manylora.bench.kernels import run as kernels
from manylora.bench.kernels.case import Arm, Case, Times, Work, check_agreement, filled, measure, num_sets
from manylora.bench.kernels.config import KERNELS, KernelsConfig, numbers_of
from manylora.bench.kernels.gather import gather_expand, gather_shrink
from manylora.bench.kernels.lora import LoraCalls
from manylora.bench.kernels.lora_data import LoraData
from manylora.bench.kernels.result import KernelFigures, KernelsResult
from manylora.bench.machine import check_memory, last_level_cache_bytes
from manylora.bench.settings import command_line
from manylora.errors import ConfigError
from manylora.kernels import native
from manylora.models.loading import load_config

NAMES = """bench rows ceilings backend isa working_set_bytes last_level_cache_bytes threads config command commit dirty
    started machine load forced""".split()
ROW_NAMES = """kernel shape num_bytes flops times gb_s gflop_s bandwidth_share product_share floor_s reached""".split()
CEILINGS = Ceilings(memory_read_gb_s=10.0, gemm_gflop_s={32: 100.0, 128: 200.0, 512: 400.0})


@pytest.fixture(scope="module")
def config(tiny_model) -> KernelsConfig:
    return KernelsConfig(
        model=tiny_model,
        lora=("7:3:4", "2:2:3"),
        decode=("3:21",),
        prefill=("2:9",),
        rows=(5,),
        repeats=2,
        sample_s=1e-4,
        threads=1,
        working_set_bytes=100_000,
        force=True,
        record=False,
    )


@pytest.fixture(scope="module")
def result(config) -> KernelsResult:
    return kernels.run(config)


def test_every_kernel_is_measured_beside_its_twin(result):
    measured = {row.kernel for row in result.rows}
    assert measured == set(KERNELS) - (set() if native.AVAILABLE else {"int8_product"})
    for row in result.rows:
        assert {"ours", "torch"} <= set(row.times), row.kernel
        assert all(times.num_calls >= 2 for times in row.times.values())
        assert all(times.least_s <= times.median_s <= times.most_s for times in row.times.values())
    for shape in ("7:3:4", "2:2:3"):
        for kernel, others in (
            ("shrink", {"gather", "dense"}),
            ("expand", {"gather", "dense"}),
            ("lora", {"gather"}),
        ):
            row = next(row for row in result.rows if (row.kernel, row.shape) == (kernel, shape))
            assert set(row.times) == {"ours", "torch"} | others


def test_the_names_of_a_row_are_frozen(result):
    row = json.loads(json.dumps(result.to_json()))
    assert sorted(row) == sorted(NAMES)
    assert all(sorted(kernel) == sorted(ROW_NAMES) for kernel in row["rows"])


def test_a_row_names_no_path_of_this_machine(result, tiny_model):
    assert tiny_model not in json.dumps(result.to_json())
    assert "--model tiny --lora 7:3:4,2:2:3 --decode 3:21" in result.command


def test_the_last_line_is_the_row(result, monkeypatch, capsys):
    monkeypatch.setattr(kernels_command, "run", lambda config, report: result)
    kernels_command.bench_kernels(result.config)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == json.loads(json.dumps(result.to_json()))
    table = "\n".join(lines[:-1])
    for word in ("shrink", "7:3:4", "of memory", "gather's", "ceilings"):
        assert word in table


def test_a_kept_record_is_named_by_day_machine_and_settings(result, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_command, "run", lambda config, report: replace(result, config=config))
    monkeypatch.setattr(records, "records_folder", lambda: tmp_path)
    kernels_command.bench_kernels(replace(result.config, record=True, json=True))
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(f"{result.started[:10]}_{result.machine.slug}_kernels-")
    same = replace(result, config=replace(result.config, force=True, json=False))
    other = replace(result, config=replace(result.config, kernels=("shrink",)))
    assert kernels_command.record_file(same, tmp_path) == file
    assert kernels_command.record_file(other, tmp_path) != file, "it would be overwritten"
    assert json.loads(file.read_text())["rows"] == json.loads(json.dumps(result.to_json()["rows"]))


def test_every_layer_of_every_group_has_rank_rows_of_its_own(tiny_model):
    data = LoraData(load_config(tiny_model), (7, 3, 4), 100_000, seed=0)
    assert len(data.sets) > 2 * data.model.num_layers
    offsets = [
        offset for one in data.sets for stack in one.values() for offset in stack.rows.a.row_offset.tolist()
    ]
    assert len(offsets) == len(set(offsets))
    calls = LoraCalls(data)
    first, second = (torch.cat([h.flatten() for h in calls.shrink(i, "reference")]) for i in (0, 1))
    assert (first - second).abs().max() > 0.1


def test_gather_is_the_lora_of_each_row():
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=generator) for shape in ((5, 6), (3, 2, 6), (3, 4, 2)))
    adapter = torch.tensor([2, 0, 0, 1, 2])
    h, y = gather_shrink(x, a, adapter), torch.ones(5, 4)
    gather_expand(y, h, b, adapter)
    for row, s in enumerate(adapter.tolist()):
        delta = b[s] @ a[s] @ x[row]
        assert delta.abs().max() > 0.1
        torch.testing.assert_close(y[row], 1 + delta)


# -- arithmetic


def times(**seconds: float) -> dict[str, Times]:
    return {name: Times(median_s=s, least_s=s, most_s=s, num_calls=1) for name, s in seconds.items()}


def case(work: Work, rate_of: str | None = None) -> Case:
    return Case("shrink", "1:1:1", work, {}, rate_of)


def test_the_floor_is_the_larger_of_bytes_and_operations():
    # 1e9 bytes take 0.1 s; 1e10 operations at up to 32 rows take 0.1 s, at 512 rows a quarter of it.
    reading = KernelFigures.of(case(Work(10**9, 10**10, 512)), times(ours=0.2, gather=3.0), CEILINGS)
    assert reading.floor_s == pytest.approx(0.1)
    assert (reading.reached, reading.bandwidth_share) == pytest.approx((0.5, 0.5))
    assert reading.product_share == pytest.approx(0.125)
    assert (reading.gb_s, reading.gflop_s) == pytest.approx((5, 50))
    assert reading.times_faster("gather") == pytest.approx(15)
    assert reading.times_faster("dense") is None
    multiplying = KernelFigures.of(case(Work(10**9, 10**11, 16)), times(ours=2.0), CEILINGS)
    assert multiplying.floor_s == pytest.approx(1.0)
    assert multiplying.reached == pytest.approx(0.5)


def test_rows_alone_are_bounded_by_their_bytes_and_integers_by_their_twin():
    rows = KernelFigures.of(case(Work(10**9, 10**12)), times(ours=0.2), CEILINGS)
    assert rows.product_share is None
    assert rows.floor_s == pytest.approx(0.1)
    integers = KernelFigures.of(
        case(Work(10**8, 10**12, 32), rate_of="torch"), times(ours=0.5, torch=0.4), CEILINGS
    )
    assert integers.floor_s == pytest.approx(0.4)


def test_implementations_take_turns_and_go_on_where_they_stopped():
    calls: list[tuple[str, int]] = []

    def arm(name: str) -> Arm:
        return Arm(lambda i: calls.append((name, i)), 3, lambda: torch.ones(1), num_warm_calls=1)

    measured = measure(
        Case("k", "s", Work(1, 1), {"ours": arm("a"), "b": arm("b")}), repeats=3, sample_s=1e-9
    )
    assert calls == [(name, i % 3) for i in range(4) for name in "ab"]
    assert measured["ours"].num_calls == 3


@pytest.mark.parametrize(
    ("ours", "other", "message"),
    [
        ([1.0, -1.0], [1.0, -0.9], "b is 0.1 of the largest value away from ours"),
        ([0.0, 0.0], [0.0, 0.0], "nothing was computed"),
        ([1.0], [float("nan")], "b is nan"),
    ],
)
def test_what_computes_something_else_is_not_timed(ours, other, message):
    arms = {
        "ours": Arm(lambda i: None, 1, lambda: torch.tensor(ours)),
        "b": Arm(lambda i: None, 1, lambda: torch.tensor(other)),
    }
    with pytest.raises(RuntimeError, match=message):
        check_agreement(Case("k", "s", Work(1, 1), arms))


def test_sets_are_together_no_smaller_than_the_working_set():
    assert [num_sets(1000, size) for size in (100, 101, 900, 5000, 0)] == [10, 10, 2, 2, 1000]
    values = filled(40, seed=1).view(torch.float32)
    assert len(values) == 10
    assert 0.1 < values.std() < 3


# -- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernels": ("shrink", "sgmv")}, r"unknown kernels \['sgmv'\]; known: shrink"),
        ({"lora": ("512:32",)}, "lora takes rows:adapters:rank, each at least 1, got '512:32'"),
        ({"lora": ("5:0:1",)}, "got '5:0:1'"),
        ({"lora": ("5:6:1",)}, "5 rows for 6 adapters"),
        ({"decode": ("a:3",)}, "decode takes sequences:context"),
        ({"prefill": ("3",)}, "prefill takes sequences:tokens"),
        ({"rows": ()}, "rows must list"),
        ({"kv_dtype": "int8"}, "unknown kv_dtype 'int8'"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"sample_s": 0.0}, "sample_s must be above 0"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        KernelsConfig(**settings)


def test_settings_of_shapes():
    assert numbers_of("lora", "rows:adapters:rank", "512:32:64") == (512, 32, 64)
    assert command_line("kernels", KernelsConfig()) == "manylora bench kernels"
    assert (
        command_line("kernels", KernelsConfig(rows=(1, 2), force=True))
        == "manylora bench kernels --rows 1,2"
    )


def test_what_does_not_fit_in_memory_is_refused(config):
    assert 1 << 15 <= last_level_cache_bytes() < 1 << 32
    with pytest.raises(ConfigError, match="ask for less with --working-set-bytes"):
        kernels.run(replace(config, working_set_bytes=1 << 60))
    check_memory(1, "nothing", "--nothing")
