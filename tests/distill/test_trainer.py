"""Distillation from end to end on tiny models: it learns, goes on to the bit after a kill, and says what went wrong."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from manylora import load_adapter
from manylora.cli.app import app
from manylora.distill import DistillConfig, distill, load_base
from manylora.distill.config import LCM_TARGETS
from manylora.distill.probe import Sampling
from manylora.distill.trainer import Distillation
from manylora.errors import ConfigError, DataError, TrainingError
from manylora.models.diffusion_base import load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd
from manylora.training.sole_run import sole_run
from tests.distill.tiny import TinyPictures, tiny_config, tiny_pictures

QUIET = Console(file=io.StringIO())


def run(config: DistillConfig, console: Console = QUIET) -> Any:
    base = load_base(config)
    return distill(config, base, tiny_pictures(base), console)


def tensors(out: Path) -> dict[str, Tensor]:
    adapter = load_adapter(out)
    return {f"{site}.{h}": getattr(p, f"lora_{h}") for site, p in adapter.sites.items() for h in "ab"}


def assert_same_bits(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert max(t.abs().max() for t in ours.values()) > 0
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_step_comes_closer_to_the_teacher(base_folders: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(
        base_folders["sd"],
        tmp_path,
        num_steps=60,
        learning_rate=2e-2,
        rank=8,
        batch=8,
        eval_every=30,
        eval_rows=6,
        guidance=4.0,
        num_solver_steps=4,
        sample_steps=(1, 2, 4),
        # A random teacher passes much of its noise through, which so small a UNet can only learn with these.
        targets=(*LCM_TARGETS, "conv_in", "conv_out"),
    )
    report = run(config)
    assert report.paired_rmse_before > 0.5, "there is something to learn"
    assert report.paired_rmse_after < 0.85 * report.paired_rmse_before

    rows = [json.loads(line) for line in (report.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "paired_rmse" in row] == [0, 30, 60]
    # The loss itself tells little: both of its ends move, and a student that has learnt nothing agrees with itself.
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
    with Image.open(report.run_folder / "samples" / "step-00000060.png") as grid:
        assert grid.size == (4 * 16, 6 * 16)
        assert json.loads(grid.text["columns"])[0] == "teacher, 4 steps at guidance 4"  # type: ignore[attr-defined]
    record = json.loads((config.out / "distill.json").read_text())
    base = load_diffusion_base(base_folders["sd"])
    assert record["base_hash"] == base.content_hash()
    assert (record["guidance"], record["w"], record["num_steps"]) == (4.0, 3.0, 60)
    assert record["adapters"] == {".": load_adapter(config.out).identity}
    assert list(record["sha256"]) == ["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("teacher_steps", [1, None])
def test_two_phases_come_closer_to_the_teacher(
    base_folders: dict[str, Path], tmp_path: Path, teacher_steps: int | None
) -> None:
    """In two steps and without fresh noise, so that the pairing with the teacher's four holds for both."""
    config = tiny_config(
        base_folders["sd"],
        tmp_path,
        objective="phased",
        phases=2,
        teacher_steps=teacher_steps,
        num_steps=60,
        learning_rate=2e-2,
        rank=8,
        batch=8,
        eval_every=30,
        eval_rows=6,
        guidance=4.0,
        num_solver_steps=4,
        sample_steps=(1,),
        targets=(*LCM_TARGETS, "conv_in", "conv_out"),
    )
    report = run(config)
    assert report.num_paired_steps == 2
    assert report.paired_rmse_before > 0.3, "there is something to learn"
    assert report.paired_rmse_after < 0.85 * report.paired_rmse_before
    with Image.open(report.run_folder / "samples" / "step-00000060.png") as grid:
        columns = json.loads(grid.text["columns"])  # type: ignore[attr-defined]
    assert columns[1:] == ["student, 1 steps", "student, 2 steps"]
    record = json.loads((config.out / "distill.json").read_text())
    assert (record["objective"], record["settings"]["phases"], record["num_paired_steps"]) == (
        "phased",
        2,
        2,
    )


def test_the_objective_is_part_of_what_a_run_is(base_folders: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(base_folders["sd"], tmp_path, num_solver_steps=4, num_steps=2)
    assert "objective" not in config.fingerprint, "a run begun before there was a choice goes on"
    run(config)
    with pytest.raises(ConfigError, match="objective"):
        run(replace(config, objective="phased", phases=2))
    with pytest.raises(ConfigError, match="phases and teacher_steps belong to the objective phased"):
        replace(config, phases=2)
    with pytest.raises(ConfigError, match="near are 3 and 6"):
        replace(config, objective="phased", phases=3)


def test_sdxl_is_distilled_and_samples(base_folders: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(base_folders["sdxl"], tmp_path, num_steps=20, batch=2, ema_decay=0.9)
    report = run(config)
    assert report.num_steps == 20
    assert math.isfinite(report.paired_rmse_after)
    assert report.paired_rmse_after != report.paired_rmse_before
    with Image.open(report.run_folder / "samples" / "step-00000020.png") as grid:
        assert len(grid.getcolors(100_000) or []) > 16, "not one flat colour"
    assert (report.run_folder / "loss.png").is_file()


def test_w_conditioned_and_full_runs(base_folders: dict[str, Path], tmp_path: Path) -> None:
    conditioned = tiny_config(base_folders["sd"], tmp_path, max_guidance=5.0, num_steps=3)
    run(conditioned)
    assert set(json.loads((conditioned.out / "distill.json").read_text())["adapters"]) == {".", "guidance"}
    assert max(t.abs().max() for name, t in tensors(conditioned.out / "guidance").items()) > 0

    full = tiny_config(base_folders["sd"], tmp_path, full=True, num_steps=3, out=tmp_path / "full")
    run(full)
    distilled, base = load_diffusion_base(full.out), load_diffusion_base(base_folders["sd"])
    assert distilled.content_hash() != base.content_hash()
    assert torch.equal(
        distilled.encode_prompts(["a cat"]).embeddings, base.encode_prompts(["a cat"]).embeddings
    )


def test_the_guidance_of_a_pass_is_one_and_differs_between_passes(
    base_folders: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny_config(base_folders["sd"], tmp_path, max_guidance=9.0)
    base = load_base(config)
    distillation = Distillation(config, base, tiny_pictures(base), QUIET)
    draws = [distillation.draw(torch.zeros(4, *base.latent_shape()), count).w for count in range(20)]
    assert all(torch.equal(w, w[:1].expand(4)) for w in draws)
    firsts = torch.stack(draws)[:, 0]
    assert 1.5 <= firsts.min() < 3 < 6 < firsts.max() <= 8.0


def test_accumulation_is_the_same_step(base_folders: dict[str, Path], tmp_path: Path) -> None:
    """Two micro-batches of four pictures give the mean of their losses, each drawn by its own count."""
    config = tiny_config(base_folders["sd"], tmp_path, accumulate=2)
    base = load_base(config)
    both = Distillation(config, base, tiny_pictures(base), QUIET)
    parts = [float(loss.detach()) for loss in both.losses(3)]
    single = replace(config, accumulate=1, name="single")
    base = load_base(single)
    alone = Distillation(single, base, tiny_pictures(base), QUIET)
    wanted = [float(loss.detach()) / 2 for count in (6, 7) for loss in alone.losses(count)]
    assert parts == wanted
    assert parts[0] != parts[1]


def test_checkpointed_gradients_are_the_same(base_folders: dict[str, Path], tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = tiny_config(base_folders["sd"], tmp_path, gradient_checkpointing=checkpointing)
        base = load_base(config)
        distillation = Distillation(config, base, tiny_pictures(base), QUIET)
        assert distillation.learner.unet.is_gradient_checkpointing is checkpointing
        (loss,) = distillation.losses(0)
        found = torch.autograd.grad(loss, list(distillation.learner.parameters.values()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bf16_learns_in_fp32(base_folders: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(base_folders["sd"], tmp_path, precision="bf16", num_steps=2, out_dtype="bf16")
    run(config)
    assert {t.dtype for t in tensors(config.out).values()} == {torch.bfloat16}


SCRIPT = """
import os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.distill.tiny import tiny_config, tiny_pictures
from manylora.distill.trainer import Distillation, load_base
from rich.console import Console
config = tiny_config(Path(sys.argv[1]), Path(sys.argv[2]), ema_decay=0.5, num_steps=6)
base = load_base(config)
distillation = Distillation(config, base, tiny_pictures(base), Console(stderr=True))
distillation.begin()
for record in distillation.steps():
    if record.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_ends_with_the_same_bits(base_folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    settings: dict[str, Any] = {"ema_decay": 0.5, "num_steps": 6}
    whole = tiny_config(base_folders["sd"], tmp_path / "whole", **settings)
    cut = tiny_config(base_folders["sd"], tmp_path / "cut", **settings)
    run(whole)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base_folders["sd"]), str(tmp_path / "cut")],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = sorted(path.name for path in (cut.run_folder / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000004"]
    assert not cut.out.exists()
    said = io.StringIO()
    run(cut, Console(file=said, width=200))
    assert "going on from step 4 of 6" in said.getvalue()
    assert_same_bits(whole.out, cut.out)

    other = tiny_config(base_folders["sd"], tmp_path / "other", **settings, seed=1)
    run(other)
    assert any(not torch.equal(t, tensors(other.out)[name]) for name, t in tensors(whole.out).items()), (
        "the comparison can fail"
    )


def counted_teacher_ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each time that the teacher's whole way is walked."""
    asked: list[int] = []
    solve = Sampling.teacher_end

    def counted(*given: Any) -> Tensor:
        asked.append(1)
        return solve(*given)

    monkeypatch.setattr(Sampling, "teacher_end", counted)
    return asked


def test_the_teachers_way_is_kept(
    base_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = counted_teacher_ends(monkeypatch)
    config = tiny_config(base_folders["sd"], tmp_path, num_steps=2)
    first = run(config)
    again = run(config)
    assert (asked, again.paired_rmse_after) == ([1], first.paired_rmse_after)
    run(replace(config, guidance=3.0, resume=False))
    assert asked == [1, 1], "another guidance is another way"


def test_a_loss_that_is_not_finite_stops_the_run(base_folders: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(base_folders["sd"], tmp_path, num_steps=6)
    base = load_base(config)
    pictures = tiny_pictures(base)
    broken = TinyPictures(pictures.latents.clone(), pictures.conditions)
    distillation = Distillation(config, base, broken, QUIET)
    distillation.begin()
    steps = distillation.steps()
    for _ in range(3):
        next(steps)
    broken.latents.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"loss is nan at step 4 of 6.*kept: .*step-00000002"):
        next(steps)
    assert not config.out.exists()
    run(config)
    assert load_adapter(config.out)


def test_a_run_of_another_base_or_setting_is_not_continued(
    base_folders: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny_config(base_folders["sd"], tmp_path, num_steps=2)
    run(config)
    with pytest.raises(ConfigError, match=r"guidance: checkpoint 2\.5, now 3\.5"):
        run(replace(config, guidance=3.5))
    other = replace(config, base=str(base_folders["sdxl"]))
    with pytest.raises(ConfigError, match="base: checkpoint"):
        run(other)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_a_run_is_not_continued_with_other_encoders_or_another_noise_schedule(
    base_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    asked = counted_teacher_ends(monkeypatch)
    base = shutil.copytree(base_folders["sd"], tmp_path / "base")
    config = tiny_config(base, tmp_path, num_steps=2)
    run(config)
    shutil.rmtree(base / part)
    shutil.copytree(tiny_sd(tmp_path / "other", seed=1) / part, base / part)
    named = "prediction: checkpoint 'v_prediction'" if part == "scheduler" else "encoders_hash: checkpoint"
    with pytest.raises(ConfigError, match=named):
        run(config)
    assert asked == [1]
    run(replace(config, resume=False))
    assert asked == [1, 1], "the teacher ends elsewhere"


def test_a_second_run_of_the_same_name_is_refused_before_it_writes(
    base_folders: dict[str, Path], tmp_path: Path, picture_folder: Path
) -> None:
    config = tiny_config(base_folders["sd"], tmp_path, out=tmp_path / "elsewhere" / "lcm")
    with sole_run(config.run_folder):
        before = sorted(config.run_folder.rglob("*"))
        with pytest.raises(ConfigError, match="another run uses"):
            run(config)
        words = [
            "--data",
            str(picture_folder),
            "--out",
            str(config.out),
            "--runs-dir",
            str(config.runs_dir),
        ]
        result = CliRunner().invoke(app, ["distill", config.base, *words, "--device", "cpu"])
        assert "another run uses" in f"{result.output}{result.exception}"
        assert sorted(config.run_folder.rglob("*")) == before


def test_what_is_no_result_is_not_replaced(base_folders: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(base_folders["sd"], tmp_path)
    config.out.mkdir()
    (config.out / "holiday.jpg").touch()
    with pytest.raises(ConfigError, match="would be replaced"):
        run(config)


def test_no_pictures(base_folders: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(base_folders["sd"], tmp_path)
    base = load_base(config)
    with pytest.raises(DataError, match="no picture"):
        distill(config, base, tiny_pictures(base, num=0), QUIET)


@pytest.mark.parametrize("full_at", ["a checkpoint", "the result"])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    base_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    config = tiny_config(base_folders["sd"], tmp_path, num_steps=4)
    fsync, writes = (
        os.fsync,
        Counting(tmp_path, "step-00000004" if full_at == "a checkpoint" else "lcm.aside"),
    )

    def full_disk(descriptor: int) -> None:
        if writes.hit(descriptor):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    kept = "step-00000002" if full_at == "a checkpoint" else "step-00000004"
    with pytest.raises(TrainingError, match=rf"No space left on device.*kept: .*{kept}.*make room"):
        run(config)
    assert not config.out.exists()
    monkeypatch.setattr(os, "fsync", fsync)
    run(config)
    assert load_adapter(config.out)


class Counting:
    """Whether a descriptor is of a file whose path holds a word."""

    def __init__(self, root: Path, word: str) -> None:
        self.root, self.word = root, word

    def hit(self, descriptor: int) -> bool:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return self.word in path and path.startswith(str(self.root))


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Six pictures: four good, one without a caption, one cut short; and one that is not there."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(6):
        colour = (40 * i, 255 - 40 * i, 128)
        Image.new("RGB", (24, 20), colour).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"colour {i}" if i != 4 else ""})
    cut = folder / "5.png"
    cut.write_bytes(cut.read_bytes()[:40])
    rows.append({"file_name": "missing.png", "text": "nothing"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_command_makes_a_lora_of_a_folder_of_pictures(
    base_folders: dict[str, Path], tmp_path: Path, picture_folder: Path
) -> None:
    given = {
        "data": picture_folder,
        "out": tmp_path / "lcm",
        "runs-dir": tmp_path / "runs",
        "guidance": 2.5,
        "rank": 2,
        "num-steps": 2,
        "batch": 2,
        "eval-rows": 2,
        "num-solver-steps": 5,
        "device": "cpu",
        "sample-steps": "1,2",
        "learning-rate": 0.05,
    }
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["distill", str(base_folders["sd"]), *options])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "left out 5.png" in said
    assert "left out missing.png" in said
    assert "5 pictures, 5 captions, 2 left out, 1 without a caption" in said
    assert load_adapter(tmp_path / "lcm").sites
    record = json.loads((tmp_path / "lcm" / "distill.json").read_text())
    assert record["data"]["num_left_out"] == 2
    assert record["w"] == 1.5

    drawn = []
    for loras in ([], ["--lora", f"{tmp_path / 'lcm'}:3"]):
        picture = tmp_path / f"{len(loras)}.png"
        made = [
            "generate",
            str(base_folders["sd"]),
            "a cat",
            "--steps",
            "2",
            "--seed",
            "1",
            "--out",
            str(picture),
        ]
        result = CliRunner().invoke(app, [*made, *loras])
        assert result.exit_code == 0, result.output
        drawn.append(picture)
    with Image.open(drawn[0]) as plain, Image.open(drawn[1]) as with_lora:
        assert plain.size == with_lora.size == (16, 16)
        assert plain.tobytes() != with_lora.tobytes()


def test_tensorboard_gets_the_same_figures_where_it_is_installed(
    base_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (Path(folder).name, purge_step) == ("tensorboard", 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    report = run(tiny_config(base_folders["sd"], tmp_path, num_steps=2))
    rows = [json.loads(line) for line in (report.run_folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "paired_rmse"):
        wanted = [(row[name], row["step"]) for row in rows if name in row]
        assert [(value, step) for n, value, step in written if n == name] == wanted
    assert written[-1][0] == "closed"
    assert not (report.run_folder / "tensorboard").exists(), "without it nothing is left"


def test_the_help_teaches() -> None:
    text = " ".join(CliRunner().invoke(app, ["distill", "--help"]).output.split())
    for word in ("--guidance", "--max-guidance", "--full", "resume", "paired_rmse", "manylora generate"):
        assert word in text
