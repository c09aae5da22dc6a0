"""Training from end to end, on tiny pipelines."""

import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from manylora.cli.app import app
from manylora.errors import ConfigError, DataError, TrainingError
from manylora.lora.convert import load_adapter
from manylora.models.diffusion_base import load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd, tiny_sdxl
from manylora.train import ImageTrainConfig, train_image
from manylora.train.image_config import TARGETS
from manylora.training.sole_run import sole_run
from tests.train.image_sets import disc, write_folder, write_tar

QUIET = Console(file=io.StringIO())
BASES = {"sd": tiny_sd, "sdxl": tiny_sdxl}
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(autouse=True)
def one_thread():
    """Bits depend on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: make(tmp_path_factory.mktemp("base") / kind) for kind, make in BASES.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "discs", [disc(seed) for seed in range(30)])


@pytest.fixture
def config(bases, pictures, tmp_path):
    return ImageTrainConfig(
        model=str(bases["sd"]),
        data=pictures,
        out=tmp_path / "lora",
        runs_dir=tmp_path / "runs",
        eval_fraction=0.2,
        rank=2,
        alpha=4.0,
        targets="all",
        dropout=0.1,
        batch_rows=5,
        accumulate=2,
        epochs=4,
        learning_rate=0.02,
        checkpoint_every=4,
        eval_every=4,
        num_samples=2,
        sample_steps=2,
        device="cpu",
        out_dtype="fp32",
    )


def given(kind, num_rows=2):
    """Inputs of a tiny UNet."""
    generator = torch.Generator().manual_seed(5)
    width = {"sd": 16, "sdxl": 24}[kind]
    inputs: dict[str, Any] = {
        "sample": torch.randn(num_rows, 4, 8, 8, generator=generator),
        "timestep": torch.arange(num_rows) * 300 + 19,
        "encoder_hidden_states": torch.randn(num_rows, 5, width, generator=generator),
    }
    if kind == "sdxl":
        pooled = torch.randn(num_rows, 12, generator=generator)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((num_rows, 6), 16.0)}
    return inputs


@torch.no_grad()
def output(unet, kind):
    return unet(**given(kind)).sample


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("kind", "targets", "bound"),
    [("sd", "attention", 0.98), ("sd", "attention+ff", 0.98), ("sd", "all", 0.9), ("sdxl", "all", 0.9)],
)
def test_it_learns_and_diffusers_loads_what_it_writes(config, bases, kind, targets, bound):
    config = replace(config, model=str(bases[kind]), targets=targets, epochs=8, rslora=targets == "all")
    report = train_image(config, QUIET)
    assert report.num_steps == 24
    assert report.eval_loss_after < bound * report.eval_loss_before

    adapter = load_adapter(config.out)
    assert adapter.base_model == config.model
    assert set(adapter.ranks.values()) == {2}
    ends = {
        end for end in TARGETS[targets] if any(f".{site}".endswith(f".{end}") for site in adapter.sites)
    }
    assert ends >= {"to_q", "to_out.0"}
    assert (targets == "all") == any(pair.kernel_size for pair in adapter.sites.values())

    merged = load_diffusion_base(bases[kind]).unet
    before = output(merged, kind)
    with torch.no_grad():
        for site, pair in adapter.sites.items():
            weight = merged.get_submodule(site).weight
            weight += pair.delta(torch.float32).reshape(weight.shape)
    wanted = output(merged, kind)
    assert (wanted - before).abs().max() > 0.01 * before.abs().max(), "the adapter changes the output"

    pipeline = PIPELINES[kind].from_pretrained(bases[kind])
    pipeline.load_lora_weights(config.out)
    torch.testing.assert_close(output(pipeline.unet, kind), wanted, atol=1e-5, rtol=1e-4)


def test_both_formats_hold_the_same_adapter(config):
    train_image(config, QUIET)
    diffusers = load_adapter(config.out)
    assert (config.out / "pytorch_lora_weights.safetensors").is_file()
    train_image(
        replace(config, out_format="peft", out=config.out.parent / "peft", name=config.out.name), QUIET
    )
    assert (config.out.parent / "peft" / "adapter_config.json").is_file()
    assert load_adapter(config.out.parent / "peft").identity == diffusers.identity


def test_what_a_run_says_of_itself(config):
    report = train_image(config, QUIET)
    record = json.loads((config.out / "training.json").read_text())
    assert record["command"].startswith("manylora train image --model ")
    assert "--targets all" in record["command"]
    assert record["eval_loss_before"] == report.eval_loss_before
    assert record["eval_loss_after"] == report.eval_loss_after
    assert (record["train_pictures"], record["eval_pictures"], record["num_left_out"]) == (24, 6, 0)
    rows = metrics(config.run_folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 8, 12]
    assert rows[0]["eval_loss"] == report.eval_loss_before
    assert (config.run_folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_samples_show_the_base_above_the_adapter(config):
    train_image(config, QUIET)
    folder = config.run_folder / "samples"
    assert sorted(path.name for path in folder.glob("*.png")) == [
        f"step-0000{step:02d}.png" for step in (0, 4, 8, 12)
    ]
    first, last = (np.asarray(Image.open(folder / f"step-0000{step}.png")) for step in ("00", "12"))
    assert first.shape == (16, 32, 3)
    assert last.shape == (32, 32, 3)
    np.testing.assert_array_equal(last[:16], first)
    assert (last[16:] != first).any(), "the adapter draws something else"
    assert len((folder / "prompts.txt").read_text().splitlines()) == 1 + 2


def test_prompts_of_a_file_are_drawn_and_no_samples_if_none_are_wanted(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red disc\n\n  a cat\na third\n")
    train_image(replace(config, sample_prompts=tmp_path / "prompts.txt", max_steps=1), QUIET)
    assert (config.run_folder / "samples" / "prompts.txt").read_text().splitlines()[1:] == [
        "a red disc",
        "a cat",
    ]
    none = replace(config, num_samples=0, max_steps=1, name="none")
    train_image(none, QUIET)
    assert not (none.run_folder / "samples").exists()
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"prompts\.txt holds no prompt"):
        train_image(replace(config, sample_prompts=tmp_path / "prompts.txt", name="empty"), QUIET)


KILLED = """
import os, signal, sys, json, torch
from pathlib import Path
from manylora.train import ImageTrainConfig, train_image
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
train_image(ImageTrainConfig(**{**settings, **paths}))
"""


def test_a_run_killed_by_sigkill_ends_with_the_same_bits(config, tmp_path):
    train_image(config, QUIET)
    killed = replace(config, out=tmp_path / "killed", name="killed")
    settings = {field.name: getattr(killed, field.name) for field in fields(killed)}
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
    train_image(killed, Console(file=written, width=300))
    assert "going on from step 4 of 12" in written.getvalue()
    assert load_adapter(killed.out).identity == load_adapter(config.out).identity
    assert metrics(killed.run_folder) == metrics(config.run_folder)
    other_seed = replace(config, out=tmp_path / "other", seed=1)
    train_image(other_seed, QUIET)
    assert load_adapter(other_seed.out).identity != load_adapter(config.out).identity


def test_a_finished_run_writes_the_same_adapter_again(config):
    first = train_image(config, QUIET)
    identity = load_adapter(config.out).identity
    second = train_image(config, QUIET)
    assert second.eval_loss_after == first.eval_loss_after
    assert load_adapter(config.out).identity == identity


def test_other_settings_pictures_or_bases_do_not_continue_a_run(config, tmp_path):
    train_image(replace(config, max_steps=2), QUIET)
    changed = replace(config, max_steps=2)
    with pytest.raises(ConfigError, match="rank: checkpoint 2, now 3"):
        train_image(replace(changed, rank=3), QUIET)
    with pytest.raises(ConfigError, match="base_hash: checkpoint"):
        train_image(replace(changed, model=str(tiny_sd(tmp_path / "other", seed=1))), QUIET)
    others = write_folder(tmp_path / "discs", [disc(seed) for seed in range(100, 130)])
    with pytest.raises(ConfigError, match="data_hash: checkpoint"):
        train_image(replace(changed, data=others), QUIET)
    train_image(replace(changed, rank=3, resume=False), QUIET)
    assert set(load_adapter(config.out).ranks.values()) == {3}


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_a_run_is_not_continued_with_other_encoders_or_another_noise_schedule(
    config, bases, tmp_path, part
):
    model = shutil.copytree(bases["sd"], tmp_path / "model")
    short = replace(config, model=str(model), max_steps=2, num_samples=0)
    train_image(short, QUIET)
    assert train_image(short, QUIET).num_steps == 2, "an unchanged base goes on"
    shutil.rmtree(model / part)
    other = tiny_sd(tmp_path / "other", seed=1, prediction="v_prediction")
    shutil.copytree(other / part, model / part)
    named = (
        "prediction: checkpoint 'epsilon', now 'v_" if part == "scheduler" else "encoders_hash: checkpoint"
    )
    with pytest.raises(ConfigError, match=named) as error:
        train_image(short, QUIET)
    assert "base_hash" not in str(error.value)


def test_a_second_run_of_the_same_name_is_refused_before_it_writes(config, tmp_path):
    with sole_run(config.run_folder):
        before = sorted(config.run_folder.rglob("*"))
        with pytest.raises(ConfigError, match="another run uses"):
            train_image(replace(config, out=tmp_path / "elsewhere" / config.out.name), QUIET)
        assert sorted(config.run_folder.rglob("*")) == before


def test_a_diverging_run_stops_and_keeps_what_was_there(config):
    train_image(config, QUIET)
    before = load_adapter(config.out).identity
    wild = replace(config, name="wild", learning_rate=1e30, checkpoint_every=1, max_grad_norm=1e30)
    with pytest.raises(
        TrainingError, match=r"stopped before the parameters changed\. The last good checkpoint is kept"
    ):
        train_image(wild, QUIET)
    assert load_adapter(config.out).identity == before


@pytest.mark.parametrize("full_at", ["parameters.safetensors", "optimizer.pt"])
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(config, full_at):
    train_image(replace(config, max_steps=4, name="whole"), QUIET)
    short = replace(config, out=config.out.parent / "full", max_steps=4)
    folder = replace(config, name="whole").run_folder / "checkpoints" / "step-00000004"
    room = (folder / full_at).stat().st_size - 1
    assert room > 40_000, "latents and metrics have room"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # writing more fails, as on a full disk
    try:
        with pytest.raises(
            TrainingError, match=r"cannot be written or read: .*\. No checkpoint was written yet\."
        ):
            train_image(short, QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not short.out.exists()
    assert not list((short.run_folder / "checkpoints").iterdir())
    assert train_image(short, QUIET).num_steps == 4


def test_half_precision(config):
    report = train_image(replace(config, precision="bf16", out_dtype="bf16", num_samples=0), QUIET)
    assert report.eval_loss_after < 0.97 * report.eval_loss_before
    assert load_adapter(config.out).dtype == torch.bfloat16


def test_gradient_checkpointing_changes_no_loss(config):
    plain = train_image(replace(config, dropout=0.0), QUIET)
    saving = train_image(replace(config, dropout=0.0, name="saving", gradient_checkpointing=True), QUIET)
    assert saving.eval_loss_after == pytest.approx(plain.eval_loss_after, rel=1e-4)


def test_a_webdataset_trains_as_its_image_folder_does(config, tmp_path):
    members: dict[str, bytes] = {}
    for seed in range(30):
        data, caption = disc(seed)
        members |= {f"{seed:03d}.png": data, f"{seed:03d}.txt": caption.encode()}
    write_tar(tmp_path / "discs.tar", members)
    train_image(config, QUIET)
    from_tar = replace(config, data=tmp_path / "discs.tar", out=tmp_path / "from-tar")
    train_image(from_tar, QUIET)
    assert load_adapter(from_tar.out).identity == load_adapter(config.out).identity


def test_min_snr_and_caption_dropout_change_what_is_learnt(config):
    train_image(config, QUIET)
    identities = {load_adapter(config.out).identity}
    for other in (replace(config, min_snr_gamma=0.0), replace(config, caption_dropout=0.9)):
        train_image(replace(other, resume=False), QUIET)
        identities.add(load_adapter(config.out).identity)
    assert len(identities) == 3


def test_weighing_all_timesteps_alike_can_be_said_on_the_command_line(config):
    alike = replace(config, min_snr_gamma=0.0, targets="attention", max_steps=1, num_samples=0)
    train_image(alike, QUIET)
    identity = load_adapter(config.out).identity
    command = json.loads((config.out / "training.json").read_text())["command"]
    assert "--min-snr-gamma 0.0" in command
    words = [*shlex.split(command)[1:], "--no-resume"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert load_adapter(config.out).identity == identity


def test_broken_pictures_and_empty_captions_are_told(config, tmp_path):
    good = [disc(seed) for seed in range(10)]
    path = write_folder(tmp_path / "mixed", [*good, (b"no picture", "a disc"), (good[0][0] + b" ", "")])
    written = io.StringIO()
    report = train_image(
        replace(config, data=path, eval_data=path, max_steps=1), Console(file=written, width=300)
    )
    assert report.num_left_out == 1
    assert f"{path}: 1 of 12 pictures left out" in written.getvalue()
    assert "010.png: cannot identify image file" in written.getvalue()
    assert f"{path}: 1 pictures without caption" in written.getvalue()


def test_bad_input_is_refused_before_anything_is_trained(config, tmp_path):
    with pytest.raises(DataError, match="is no image data set"):
        train_image(replace(config, data=tmp_path / "nothing"), QUIET)
    with pytest.raises(ConfigError, match="height must be a multiple of 4 pixels"):
        train_image(replace(config, size=18), QUIET)
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is no adapter"):
        train_image(config, QUIET)
    assert (config.out / "thesis.tex").exists()


def test_the_command_trains(config, tmp_path):
    options = {
        "model": config.model,
        "data": config.data,
        "out": tmp_path / "it",
        "runs-dir": tmp_path / "runs",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    settings = [
        "--max-steps",
        "1",
        "--rank",
        "1",
        "--targets",
        "attention",
        "--device",
        "cpu",
        "--num-samples",
        "0",
    ]
    result = CliRunner().invoke(app, ["train", "image", *words, *settings])
    assert result.exit_code == 0, result.output
    adapter = load_adapter(tmp_path / "it")
    assert set(adapter.ranks.values()) == {1}
    assert adapter.dtype == torch.float16
    assert Path(tmp_path / "runs" / "it" / "metrics.jsonl").is_file()
