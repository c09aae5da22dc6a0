"""Training from end to end, on a tiny model."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from manylora.errors import ConfigError, DataError, TrainingError
from manylora.lora.formats import load_peft
from manylora.train import TextTrainConfig, train_text
from manylora.training.sole_run import sole_run
from tests.train.tiny import save_tiny, tiny_model

QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def one_thread():
    """Bits depend on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tiny_folder, data_file, tmp_path):
    return TextTrainConfig(
        model=str(tiny_folder),
        data=data_file,
        out=tmp_path / "adapter",
        runs_dir=tmp_path / "runs",
        eval_fraction=0.2,
        rank=2,
        dropout=0.1,
        batch_rows=3,
        accumulate=2,
        epochs=3,
        learning_rate=0.05,
        checkpoint_every=4,
        max_tokens=64,
        device="cpu",
        out_dtype="fp32",
    )


def test_it_learns_and_leaves_an_adapter_that_peft_and_manylora_read(config, tiny_folder):
    config = replace(config, base_name="tiny-chat", rslora=True)
    report = train_text(config, QUIET)
    assert report.num_steps == 12
    assert report.eval_loss_after < 0.7 * report.eval_loss_before

    adapter = load_peft(config.out)
    assert adapter.base_model == "tiny-chat"
    assert set(adapter.ranks.values()) == {2}
    assert len(adapter.sites) == 2 * 4
    merged = tiny_model()
    for site, pair in adapter.sites.items():
        assert pair.scaling == pytest.approx(4 / 2**0.5)
        delta = pair.delta(torch.float32)
        assert delta.abs().max() > 1e-3
        merged.get_submodule(site).weight.data += delta
    tokens = torch.arange(40)[None]
    from_peft = PeftModel.from_pretrained(tiny_model(), config.out)(tokens).logits
    torch.testing.assert_close(merged(tokens).logits, from_peft)
    assert not torch.allclose(tiny_model()(tokens).logits, from_peft, atol=1e-2)


def test_what_a_run_says_of_itself(config):
    report = train_text(config, QUIET)
    record = json.loads((config.out / "training.json").read_text())
    assert record["command"].startswith("manylora train text --model ")
    assert "--rank 2" in record["command"]
    assert "--batch-rows 3" in record["command"]
    assert record["eval_loss_before"] == report.eval_loss_before
    assert record["eval_loss_after"] == report.eval_loss_after
    assert record["num_steps"] == 12
    assert (record["train_rows"], record["eval_rows"]) == (24, 6)
    assert record["train_target_tokens"] == 24 * len("yes.")
    assert record["environment"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, *range(1, 13), 12]
    assert rows[0]["eval_loss"] == report.eval_loss_before
    assert rows[-1]["eval_loss"] == report.eval_loss_after
    assert (config.run_folder / "loss.png").read_bytes().startswith(b"\x89PNG")


KILLED = """
import os, signal, sys, json, torch
from pathlib import Path
from manylora.train import TextTrainConfig, train_text
from manylora.training.metrics import MetricsLog

append = MetricsLog.append
def append_then_die(self, row):
    append(self, row)
    if row["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsLog.append = append_then_die
torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
paths = {name: Path(settings[name]) for name in ("data", "out", "runs_dir")}
train_text(TextTrainConfig(**{**settings, **paths, "targets": tuple(settings["targets"])}))
"""


def test_a_run_killed_by_sigkill_ends_with_the_same_bits(config, tmp_path):
    train_text(config, QUIET)
    killed = replace(config, out=tmp_path / "killed", name="killed")
    settings = {name: getattr(killed, name) for name in TextTrainConfig.__slots__}
    child = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(settings, default=str)],
        env=os.environ,
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not killed.out.exists()
    assert [path.name for path in (killed.run_folder / "checkpoints").iterdir()] == ["step-00000004"]

    written = io.StringIO()
    console = Console(file=written, width=300)
    train_text(killed, console)
    assert "going on from step 4 of 12" in written.getvalue()
    assert (killed.out / "adapter_model.safetensors").read_bytes() == (
        config.out / "adapter_model.safetensors"
    ).read_bytes()

    def measured(folder: Path):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert measured(killed.run_folder) == measured(config.run_folder)
    other_seed = replace(config, out=tmp_path / "other", seed=1)
    train_text(other_seed, QUIET)
    assert (other_seed.out / "adapter_model.safetensors").read_bytes() != (
        config.out / "adapter_model.safetensors"
    ).read_bytes()


def test_a_finished_run_writes_the_same_adapter_again(config):
    first = train_text(config, QUIET)
    data = (config.out / "adapter_model.safetensors").read_bytes()
    second = train_text(replace(config, out_dtype="fp32"), QUIET)
    assert second.eval_loss_after == first.eval_loss_after
    assert (config.out / "adapter_model.safetensors").read_bytes() == data


def test_other_settings_do_not_continue_a_run_but_may_start_it_afresh(config):
    train_text(config, QUIET)
    other = replace(config, rank=3)
    with pytest.raises(ConfigError, match="rank: checkpoint 2, now 3"):
        train_text(other, QUIET)
    train_text(replace(other, resume=False), QUIET)
    assert set(load_peft(config.out).ranks.values()) == {3}


def test_a_run_is_not_continued_on_other_weights_at_the_same_path(config, tmp_path):
    short = replace(config, model=str(save_tiny(tmp_path / "model")), max_steps=2)
    train_text(short, QUIET)
    assert train_text(short, QUIET).num_steps == 2, "an unchanged base goes on"
    other = tiny_model()
    with torch.no_grad():
        other.model.norm.weight += 0.1
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="base_hash: checkpoint"):
        train_text(short, QUIET)


def test_a_second_run_of_the_same_name_is_refused_before_it_writes(config, tmp_path):
    with sole_run(config.run_folder):
        before = sorted(config.run_folder.rglob("*"))
        with pytest.raises(ConfigError, match="another run uses"):
            train_text(replace(config, out=tmp_path / "elsewhere" / config.out.name), QUIET)
        assert sorted(config.run_folder.rglob("*")) == before


@pytest.mark.parametrize("full_at", ["parameters.safetensors", "optimizer.pt"])
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(config, full_at):
    config = replace(config, rank=8, max_steps=4)
    train_text(replace(config, name="whole"), QUIET)
    folder = replace(config, name="whole").run_folder / "checkpoints" / "step-00000004"
    room = (folder / full_at).stat().st_size - 1
    short = replace(config, out=config.out.parent / "full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # writing more fails, as on a full disk
    try:
        with pytest.raises(
            TrainingError,
            match=r"cannot be written or read: .*\. No checkpoint was written yet\. .*make room",
        ):
            train_text(short, QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not short.out.exists()
    assert train_text(short, QUIET).num_steps == 4


def test_a_diverging_run_stops_and_keeps_what_was_there(config):
    train_text(config, QUIET)
    before = (config.out / "adapter_model.safetensors").read_bytes()
    wild = replace(config, name="wild", learning_rate=1e30, checkpoint_every=1, max_grad_norm=1e30)
    with pytest.raises(
        TrainingError, match=r"stopped before the parameters changed\. The last good checkpoint is kept"
    ):
        train_text(wild, QUIET)
    assert (config.out / "adapter_model.safetensors").read_bytes() == before


def test_bf16(config):
    report = train_text(replace(config, precision="bf16", out_dtype="bf16"), QUIET)
    assert report.eval_loss_after < 0.7 * report.eval_loss_before
    assert load_peft(config.out).dtype == torch.bfloat16


def test_rows_that_were_cut_are_told(config):
    written = io.StringIO()
    console = Console(file=written, width=300)
    train_text(replace(config, max_tokens=20, max_steps=1), console)
    assert "training rows over 20 tokens:" in written.getvalue()
    with pytest.raises(DataError, match="no training row fits into max_tokens = 3"):
        train_text(replace(config, max_tokens=3, overlong="drop", name="none"), QUIET)


def test_a_folder_that_is_no_adapter_is_not_replaced(config):
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is no adapter"):
        train_text(config, QUIET)
    assert (config.out / "thesis.tex").exists()
