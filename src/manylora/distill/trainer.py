"""`manylora distill`: one run, from a base and encoded pictures to a LoRA that needs 1 to 8 steps.

In the run's folder:

    metrics.jsonl         loss, learning rate, gradient norm and seconds of each step; each look's paired distance
    samples/              a grid each look: the teacher's solver, then the student at each of `sample_steps`
    checkpoints/          the newest two
    teacher.safetensors   where the teacher's solver takes the looks' noise
    loss.png              at the end
    lock                  held while a run uses the folder
"""

# Shapes: B rows of a batch, P rows of a look; latents are [.., 4, h, w].

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from manylora.diffusion import guidance_weight
from manylora.distill.board import Board
from manylora.distill.config import DistillConfig
from manylora.distill.cost import training_bytes
from manylora.distill.ema import EmaWeights
from manylora.distill.learners import DistilledLora, DistilledUnet
from manylora.distill.looks import Looks
from manylora.distill.networks import AveragedStudent, UnetStudent, UnetTeacher
from manylora.distill.objective import ConsistencyObjective, Draw, Objective
from manylora.distill.output import RECORD, write_result
from manylora.distill.phased import PhasedConfig, PhasedObjective
from manylora.distill.pictures import Pictures, RowOrder, about, batch_of, generator_at
from manylora.distill.probe import Sampling
from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base
from manylora.models.fingerprint import diffusion_fingerprint
from manylora.training.disk import disk_errors
from manylora.training.hardware import describe_environment, make_accelerator
from manylora.training.loop import StepRecord, TrainingRun
from manylora.training.out_folder import refuse_to_replace
from manylora.training.plot import plot_losses
from manylora.training.progress import with_progress
from manylora.training.resume import take_up
from manylora.training.sole_run import sole_run

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class DistillReport:
    """What a finished run says of itself; also in distill.json."""

    out: Path
    run_folder: Path
    num_steps: int
    paired_rmse_before: float
    """`num_paired_steps` of the base, unguided and with nothing learnt, against the teacher's solver; latents' spread
    is 1."""
    paired_rmse_after: float
    """As many steps of the student against the same."""
    num_paired_steps: int
    """1, or the phases of the objective."""
    train_seconds: float
    """Time spent in steps, over all parts of an interrupted run."""


def load_base(config: DistillConfig) -> DiffusionBase:
    """Load the model to distil, where and in the precision that the config says.

    Raises:
        ModelError: it cannot be loaded.
    """
    # What learns must be fp32, and with `full` that is the UNet itself.
    half = config.precision == "bf16" and not config.full
    device = make_accelerator(config.device, config.precision).device
    return load_diffusion_base(config.base, dtype=torch.bfloat16 if half else torch.float32, device=device)


def distill(
    config: DistillConfig, base: DiffusionBase, pictures: Pictures, console: Console | None = None
) -> DistillReport:
    """Distil a base and write the result to `config.out`; goes on where an interrupted run of these settings stopped.

    A run that was killed ends with the same bits as one that was not, on the same machine and thread count.

    Args:
        base: from `load_base`. Its UNet gets the LoRA's layers and is of no other use afterwards.
        pictures: encoded by this base at `config.size`.
        console: for notes and the progress bar; stderr by default.
    Raises:
        ConfigError: settings that contradict each other, the model, or the run that is to be continued; an `out` that
            cannot be replaced; another run that uses the run's folder.
        TrainingError: loss or gradient is not finite, or the disk is full; the last good checkpoint is kept.
    """
    console = console or Console(stderr=True)
    refuse_to_replace(config.out, "distilled LoRA", (RECORD,))
    with disk_errors(config.run_folder, config.out), sole_run(config.run_folder):
        distillation = Distillation(config, base, pictures, console)
        distillation.begin()
        records = distillation.steps()
        for _ in with_progress(
            records,
            title=config.out.name,
            done=distillation.run.step,
            num_steps=config.num_steps,
            console=console,
        ):
            pass
        report = distillation.finish()
    console.print(
        f"{config.out}: distance to the teacher in {report.num_paired_steps} "
        f"step{'s' * (report.num_paired_steps > 1)} {report.paired_rmse_before:.3f} -> "
        f"{report.paired_rmse_after:.3f} after {report.num_steps} steps, {report.train_seconds:.0f} s; "
        f"metrics and samples in {report.run_folder}",
        soft_wrap=True,
    )
    return report


class Distillation:
    """One run: what learns, its teacher, its data and its folder."""

    def __init__(
        self, config: DistillConfig, base: DiffusionBase, pictures: Pictures, console: Console
    ) -> None:
        self.config, self.pictures, self.console = config, pictures, console
        self.base_hash = base.content_hash()
        self.accelerator: Accelerator = make_accelerator(config.device, config.precision)
        size = config.size or base.default_size
        self.latent_shape = base.latent_shape(size, size)
        unconditional = base.unconditional(height=size, width=size)
        # Texts are encoded; from here on only the UNet and, for looks, the VAE are needed.
        self.base = replace(base, text_encoders=(), tokenizers=())
        self.learner = DistilledUnet(base.unet) if config.full else DistilledLora(base.unet, config)
        if config.gradient_checkpointing:
            self.learner.unet.train().enable_gradient_checkpointing()
        self.student = UnetStudent(self.learner, self.accelerator)
        self.teacher = UnetTeacher(self.learner, unconditional, self.accelerator)
        self.ema = (
            None if config.ema_decay is None else EmaWeights(self.learner.parameters, config.ema_decay)
        )
        self.objective = _objective(config, base)
        self.order = RowOrder(len(pictures), config.batch, config.seed)
        self.run = TrainingRun(
            config.run_folder,
            config.loop,
            self.learner.parameters,
            self.accelerator,
            {
                **config.fingerprint,
                "base": self.base_hash,
                **diffusion_fingerprint(base),
                "data": pictures.content_hash,
            },
            {} if self.ema is None else {f"average.{n}": t for n, t in self.ema.average.items()},
        )
        self.looks = Looks(
            config, self.base, pictures, Sampling(self.objective, config.batch), self.latent_shape
        )
        self.board: Board | None = None

    def begin(self) -> None:
        """Take up the run where it stands, or begin it; says what was left out of the data and what memory it takes."""
        for name, reason in list(self.pictures.left_out.items())[:10]:
            self.console.print(f"left out {name}: {reason}", soft_wrap=True)
        told = about(self.pictures)
        self.console.print(
            f"{told['num_pictures']} pictures, {told['num_captions']} captions, {told['num_left_out']} left out, "
            f"{told['num_without_caption']} without a caption, {told['num_captions_cut']} captions cut to what the "
            "text encoder takes; "
            f"memory: {training_bytes(self.learner, self.ema is not None)}",
            soft_wrap=True,
        )
        take_up(self.run, self.console, resume=self.config.resume)
        self.looks.prepare(self.teacher, self.run.fingerprint)
        self.board = Board(self.run.folder / "tensorboard", self.run.step)

    def steps(self) -> Iterator[StepRecord]:
        """Run the steps that are left, with a look before the first, now and then, and after the last."""
        self._look_if_due()
        for record in self.run.steps(self.losses):
            if self.ema is not None:
                self.ema.update()
            if self.board is not None:
                self.board.add(record.step, {"loss": record.loss, "steps_per_s": 1.0 / record.seconds})
            self._look_if_due()
            yield record

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield the losses of a step's micro-batches; their sum is the mean over its pictures."""
        for count in range(step * self.config.accumulate, (step + 1) * self.config.accumulate):
            latents, condition = batch_of(
                self.pictures, self.order.rows(count), self.accelerator.device
            )  # [B, 4, h, w]
            loss = self.objective.loss(
                self.student,
                self.teacher,
                self._target_student(),
                latents,
                condition,
                self.draw(latents, count),
            )
            yield loss / self.config.accumulate

    def draw(self, latents: Tensor, count: int) -> Draw:
        """Return what chance decides about a micro-batch: a function of its count."""
        draw = self.objective.draw(latents, generator_at(self.config.seed, 1, count))
        if self.config.max_guidance is None:
            return draw
        # The guidance adapter's weight holds for a whole pass, so its rows share one scale.
        return replace(draw, w=draw.w[:1].expand(len(draw.w)))

    def finish(self) -> DistillReport:
        """Write the result, and draw the losses."""
        if self.board is not None:
            self.board.close()
        distances = [row["paired_rmse"] for row in self.run.metrics.rows() if "paired_rmse" in row]
        report = DistillReport(
            self.config.out,
            self.run.folder,
            self.run.step,
            distances[0],
            distances[-1],
            self.objective.num_paired_steps,
            round(self.run.notes["train_seconds"], 1),
        )
        plot_losses(
            self.run.metrics.rows(),
            self.run.folder / "loss.png",
            self.config.out.name,
            unit=self.config.loss,
        )
        with self._averaged():
            write_result(self.learner, self.config, self.base.folder, self._record(report))
        return report

    def _target_student(self) -> UnetStudent | AveragedStudent:
        return self.student if self.ema is None else AveragedStudent(self.student, self.ema)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with nullcontext() if self.ema is None else self.ema.in_use():
            yield

    def _look_if_due(self) -> None:
        step = self.run.step
        if step % self.config.eval_every and step != self.config.num_steps:
            return
        with self._averaged():
            distance = self.looks.look(self.student, step)
        self.run.metrics.append({"step": step, "paired_rmse": distance})
        if self.board is not None:
            self.board.add(step, {"paired_rmse": distance})

    def _record(self, report: DistillReport) -> dict[str, Any]:
        config, numbers = self.config, asdict(report)
        return {
            "base": config.base_name or config.base,
            "base_hash": self.base_hash,
            "guidance": config.guidance,
            "w": guidance_weight(config.guidance),
            "max_guidance": config.max_guidance,
            "objective": config.objective,
            "settings": config.as_json(),
            "data": about(self.pictures),
            **{
                k: numbers[k]
                for k in (
                    *("num_steps", "paired_rmse_before", "paired_rmse_after", "num_paired_steps"),
                    "train_seconds",
                )
            },
            "environment": describe_environment(self.accelerator.device),
        }


def _objective(config: DistillConfig, base: DiffusionBase) -> Objective:
    settings = config.objective_config
    if isinstance(settings, PhasedConfig):
        return PhasedObjective(base.schedule, base.prediction, settings)
    return ConsistencyObjective(base.schedule, base.prediction, settings)
