"""`manylora train image`: LoRA fine-tuning of a diffusion model's UNet on captioned pictures."""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from manylora.errors import DataError
from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base
from manylora.models.fingerprint import diffusion_fingerprint
from manylora.train.image_config import ImageTrainConfig
from manylora.train.image_encoded import NO_CAPTION, EncodedPictures, encode_pictures, split_by_content
from manylora.train.image_look import Look
from manylora.train.image_model import ImageStudent, step_losses
from manylora.train.image_output import DTYPES, MARKS, write_adapter
from manylora.train.plan import loop_config, num_steps, steps_per_epoch
from manylora.train.text_output import command_line
from manylora.training.disk import disk_errors
from manylora.training.hardware import describe_environment, make_accelerator
from manylora.training.loop import TrainingRun
from manylora.training.out_folder import refuse_to_replace
from manylora.training.plot import plot_losses
from manylora.training.progress import with_progress
from manylora.training.resume import take_up
from manylora.training.sole_run import sole_run

# Settings that say where things go, or when and how a run is looked at: a continued run may change them. The base and
# the pictures are known by what they hold.
_NOT_OF_THE_TRAJECTORY = frozenset(
    "model data eval_data out out_format out_dtype name runs_dir base_name checkpoint_every resume device "
    "eval_every sample_prompts num_samples sample_steps sample_guidance gradient_checkpointing".split()
)
_NAMED = 10
"""Pictures left out that are named on the screen; all are in the run's folder."""


@dataclass(frozen=True)
class ImageTrainReport:
    """What a finished run says of itself; also in training.json."""

    out: Path
    run_folder: Path
    num_steps: int
    eval_loss_before: float
    """Mean squared error of the network's output on the held-out pictures under the base alone."""
    eval_loss_after: float
    """The same with the adapter."""
    train_seconds: float
    """Time spent in steps, over all parts of an interrupted run."""
    num_left_out: int
    """Pictures, held-out ones included, that could not be used."""


@dataclass(frozen=True)
class _Data:
    """The pictures of a run: which set and rows are trained on, which judge."""

    train: EncodedPictures
    train_rows: list[int]
    held_out: EncodedPictures
    held_out_rows: list[int]
    left_out: Mapping[str, str]

    @property
    def hashes(self) -> dict[str, str]:
        return {"data_hash": self.train.content_hash, "eval_hash": self.held_out.content_hash}


def train_image(config: ImageTrainConfig, console: Console | None = None) -> ImageTrainReport:
    """Train an adapter and write it to `config.out`; goes on where an interrupted run of the same settings stopped.

    A run that was killed ends with the same bits as one that was not, on the same machine and thread count.

    Args:
        console: for notes and the progress bar; stderr by default.
    Raises:
        ConfigError: settings that contradict each other, the model, or the run that is to be continued; an `out` that
            cannot be replaced; another run that uses the run's folder.
        DataError: no data set, none of its pictures can be used, or a line that cannot be read; with file and line.
        ModelError: the base model cannot be loaded.
        TrainingError: loss or gradient is not finite (the last good checkpoint is kept), or the disk is full.
    """
    console = console or Console(stderr=True)
    refuse_to_replace(config.out, "adapter", MARKS)
    with disk_errors(config.run_folder, config.out), sole_run(config.run_folder):
        accelerator = make_accelerator(config.device, config.precision)
        base = load_diffusion_base(config.model, device=accelerator.device)
        size = config.size or base.default_size
        base.latent_shape(
            size, size
        )  # refuses a size that the UNet cannot take, before anything is encoded
        # Of the base's own weights: afterwards PEFT's layers stand among them.
        known = {"base_hash": base.content_hash(), "size": size, **diffusion_fingerprint(base)}
        data = _load_data(config, base, size, console)
        return _train(ImageStudent(base, config, accelerator), data, known, console)


def _train(
    student: ImageStudent, data: _Data, known: Mapping[str, Any], console: Console
) -> ImageTrainReport:
    """Run the steps that are left and write the adapter.

    Args:
        known: what fixes the trajectory beside settings and pictures: the base and the size.
    """
    config = student.config
    steps = _StepPlan(data.train_rows, config)
    run = TrainingRun(
        config.run_folder,
        loop_config(config, steps.num_steps),
        student.parameters,
        student.accelerator,
        {**_fingerprint(config), **data.hashes, **known},
    )
    look = Look(student, data.held_out, data.held_out_rows, run, known["size"])
    take_up(run, console, resume=config.resume)
    look.begin()
    records = run.steps(step_losses(student, data.train, steps.batches))
    for record in with_progress(
        records, title=config.out.name, done=run.step, num_steps=steps.num_steps, console=console
    ):
        if record.step % config.eval_every == 0 and record.step < steps.num_steps:
            look.at_step()
    after = look.at_step()
    title = f"{config.out.name}: rank {config.rank}"
    plot_losses(run.metrics.rows(), run.folder / "loss.png", title, unit="mean squared error")
    report = ImageTrainReport(
        config.out,
        run.folder,
        run.step,
        run.notes["eval_loss_before"],
        after,
        round(run.notes["train_seconds"], 1),
        len(data.left_out),
    )
    told = _record(config, report, data, known)
    told["environment"] = describe_environment(student.accelerator.device)
    write_adapter(student.adapter(DTYPES[config.out_dtype]), config, told)
    console.print(
        f"{config.out}: held-out loss {report.eval_loss_before:.4f} -> {after:.4f} after {run.step} steps, "
        f"{report.train_seconds:.0f} s; metrics, plot and samples in {run.folder}",
        soft_wrap=True,
    )
    return report


class _StepPlan:
    """Which pictures each optimizer step sees: a function of the step, so there is no position to store."""

    def __init__(self, rows: list[int], config: ImageTrainConfig) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch(config, len(rows))
        self.num_steps = num_steps(config, len(rows))
        self._order = lru_cache(maxsize=1)(lambda epoch: _shuffled(rows, f"{config.seed}/{epoch}"))

    def batches(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, self.steps_per_epoch)
        size, order = self.config.batch_rows, self._order(epoch)
        first = index * self.config.accumulate * size
        rows = order[first : first + self.config.accumulate * size]
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def _shuffled(rows: list[int], seed: str) -> list[int]:
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order


def _load_data(config: ImageTrainConfig, base: DiffusionBase, size: int, console: Console) -> _Data:
    def encode(path: Path, part: str) -> EncodedPictures:
        folder = config.run_folder / "encoded" / part
        encoded = encode_pictures(path, base, size, config.empty_captions == "skip", folder, console)
        _tell(path, encoded, folder, console)
        return encoded

    train = encode(config.data, "data")
    if config.eval_data is None:
        held_out = train
        train_rows, held_out_rows = split_by_content(train.digests, config.eval_fraction, config.seed)
    else:
        held_out = encode(config.eval_data, "eval_data")
        train_rows, held_out_rows = list(range(len(train))), list(range(len(held_out)))
    if not train_rows or not held_out_rows:
        raise DataError(f"{config.data}: no picture is left to train on or to hold out")
    judged = _evenly(held_out_rows, config.max_eval_pictures)
    return _Data(train, train_rows, held_out, judged, {**train.left_out, **held_out.left_out})


def _evenly(rows: list[int], most: int) -> list[int]:
    """At most so many of the rows, from all of them: data sets often lie sorted."""
    return [rows[index * len(rows) // most] for index in range(most)] if len(rows) > most else rows


def _tell(path: Path, encoded: EncodedPictures, folder: Path, console: Console) -> None:
    """Say what was left out, by name, and which captions are empty."""
    if encoded.left_out:
        console.print(
            f"{path}: {len(encoded.left_out)} of {len(encoded) + len(encoded.left_out)} pictures left out, "
            f"listed in {folder / 'about.json'}",
            soft_wrap=True,
        )
        for name, reason in list(encoded.left_out.items())[:_NAMED]:
            console.print(f"  {name}: {reason}", soft_wrap=True, markup=False)
    if encoded.num_cut:
        console.print(
            f"{path}: {encoded.num_cut} captions are longer than the text encoder takes; their ends are cut",
            soft_wrap=True,
        )
    num_empty = int((encoded.caption_rows == NO_CAPTION).sum())
    if num_empty:
        console.print(
            f"{path}: {num_empty} pictures without caption, which train the model without prompt",
            soft_wrap=True,
        )


def _fingerprint(config: ImageTrainConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NOT_OF_THE_TRAJECTORY}


def _record(
    config: ImageTrainConfig, report: ImageTrainReport, data: _Data, known: Mapping[str, Any]
) -> dict[str, Any]:
    numbers = asdict(report)
    kept = ("num_steps", "eval_loss_before", "eval_loss_after", "train_seconds", "num_left_out")
    return {
        "command": command_line(config, "image"),
        "seed": config.seed,
        **known,
        **data.hashes,
        "train_pictures": len(data.train_rows),
        "eval_pictures": len(data.held_out_rows),
        **{name: numbers[name] for name in kept},
    }
