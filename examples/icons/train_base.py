"""Train UNet and text encoder on cached latents: python -m icons.train_base.

Goes on where it was interrupted, and ends with the same bits on the same machine and thread count. In the run's folder:

    metrics.jsonl     loss, learning rate and seconds of each step; held-out loss of the average
    samples/          a grid every `look_every` steps: the same captions and noise each time
    checkpoints/      the newest two
    loss.png          at the end
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from icons.folders import LATENTS_FOLDER, RUNS_FOLDER
from icons.image_folder import save_grid
from icons.latents import read_split
from icons.models import ModelSize, computing_in, fastest_precision, generator, load_vae, nothing_but
from icons.student import Student, starting_noise
from manylora.training import LoopConfig, StepRecord, TrainingRun
from manylora.training.hardware import Precision, make_accelerator
from manylora.training.plot import plot_losses

_NOT_OF_THE_TRAJECTORY = (
    "checkpoint_every",
    "look_every",
    "look_captions",
    "look_steps",
    "num_judged",
    "size",
)

LOOK_CAPTIONS = (
    *("a cat", "a dog", "a pizza", "a house", "a rocket", "an apple", "a tree", "a bicycle"),
    *("an owl", "a castle", "a guitar", "a pair of glasses", "a heart", "a frog", "a bus", "an ice cream"),
    *("a banana", "a whale", "a crown", "a rose", "a panda", "a camera", "a mushroom", "a skull"),
)


@dataclass(frozen=True, kw_only=True)
class BaseTraining:
    """What fixes the base's trajectory, and how often it is looked at."""

    num_steps: int = 7000
    batch: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    final_fraction: float = 0.01
    average_decay: float = 0.998
    caption_dropout: float = 0.1
    seed: int = 0
    precision: Precision = field(default_factory=fastest_precision)
    size: ModelSize = field(default_factory=ModelSize)

    checkpoint_every: int = 100
    look_every: int = 500
    look_captions: tuple[str, ...] = LOOK_CAPTIONS
    look_steps: int = 20
    num_judged: int = 512
    """Held-out pictures whose loss is measured."""

    def fingerprint(self) -> dict[str, object]:
        return nothing_but(asdict(self), _NOT_OF_THE_TRAJECTORY) | {
            "unet_channels": list(self.size.unet_channels),
            "text_width": self.size.text_width,
        }


class Order:
    """Which pictures each step sees: every picture once an epoch, a function of the step alone."""

    def __init__(self, num_rows: int, batch: int, seed: int) -> None:
        self.batch, self.steps_per_epoch = batch, num_rows // batch
        self._epoch = lru_cache(maxsize=1)(
            lambda epoch: torch.randperm(num_rows, generator=generator(seed, 0, epoch)).numpy()
        )

    def rows(self, step: int) -> np.ndarray:
        """Return [batch] row numbers of step `step`, from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index * self.batch : (index + 1) * self.batch]


class BaseRun:
    """One run: the student, its data and its folder."""

    def __init__(
        self, latents: Path, folder: Path, config: BaseTraining, say: Callable[[str], None] = print
    ) -> None:
        self.config, self.say, self.folder = config, say, folder
        about = json.loads((latents / "about.json").read_text(encoding="utf-8"))
        self.train, self.held_out = read_split(latents, "train"), read_split(latents, "held_out")
        self.judged = range(len(self.held_out.latents))[: config.num_judged]
        self.vae: AutoencoderKL = load_vae(latents / "vae")
        tokenizer = CLIPTokenizer.from_pretrained(latents / "tokenizer")
        self.student = Student(config.size, tokenizer, config.seed)
        self.order = Order(len(self.train.latents), config.batch, config.seed)
        self.run = TrainingRun(
            folder,
            LoopConfig(
                num_steps=config.num_steps,
                learning_rate=config.learning_rate,
                warmup_steps=min(config.warmup_steps, config.num_steps - 1),
                final_fraction=config.final_fraction,
                checkpoint_every=config.checkpoint_every,
            ),
            self.student.parameters,
            make_accelerator("cpu", "fp32"),
            config.fingerprint() | {"data": about["sha256"]},
            self.student.averaged_tensors,
        )

    def resume(self) -> bool:
        """Take up the newest checkpoint; returns whether there was one."""
        found = self.run.resume()
        if found:
            self.say(f"base: going on from step {self.run.step} of {self.config.num_steps}")
        return found

    def steps(self) -> Iterator[StepRecord]:
        """Run the steps that are left, looking at the average now and then."""
        # What was measured at the checkpoint's own step is measured again: the log was cut back to before it.
        self._look()
        for record in self.run.steps(self._losses):
            self.student.update_average(record.step, self.config.average_decay)
            self._look()
            yield record

    def _losses(self, step: int) -> Iterator[Tensor]:
        draw = generator(self.config.seed, 1, step)
        with computing_in(self.config.precision):
            loss = self.student.loss(self.train, self.order.rows(step), draw, self.config.caption_dropout)
        yield loss

    def _look(self) -> None:
        step = self.run.step
        if step % self.config.look_every and step != self.config.num_steps:
            return
        loss = self.student.held_out_loss(self.held_out, self.judged, self.config.seed)
        self.run.metrics.append({"step": step, "eval_loss": loss})
        self.say(f"base step {step}  held out {loss:.4f}")
        self.draw_samples(self.folder / "samples" / f"step-{step:06d}.png")

    def draw_samples(self, path: Path, guidance: float = 2.5) -> None:
        """Draw the look captions with the average, from the same noise each time."""
        captions = list(self.config.look_captions)
        noise = starting_noise(len(captions), self.config.seed)
        pipeline = self.student.pipeline(self.vae)
        drawn = pipeline(
            captions,
            latents=noise,
            num_inference_steps=self.config.look_steps,
            guidance_scale=guidance,
            output_type="np",
        ).images  # [N, 64, 64, 3] in [0, 1]
        save_grid((drawn * 255).round().astype(np.uint8), 8, path)


def train_base(
    latents: Path, folder: Path, config: BaseTraining, say: Callable[[str], None] = print
) -> BaseRun:
    """Train, or go on, to the end; draws the losses."""
    base = BaseRun(latents, folder, config, say)
    base.resume()
    for record in base.steps():
        if record.step % 50 == 0:
            left = (config.num_steps - record.step) * record.seconds
            say(
                f"base step {record.step}/{config.num_steps}  loss {record.loss:.4f}  "
                f"{record.seconds:.2f} s a step, about {left / 60:.0f} minutes left"
            )
    plot_losses(base.run.metrics.rows(), folder / "loss.png", "the base", unit="mean squared error of v")
    return base


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, default=LATENTS_FOLDER)
    parser.add_argument("--run", type=Path, default=RUNS_FOLDER / "base")
    parser.add_argument("--num-steps", type=int, default=BaseTraining.num_steps)
    options = parser.parse_args()
    train_base(options.latents, options.run, BaseTraining(num_steps=options.num_steps))


if __name__ == "__main__":
    main()
