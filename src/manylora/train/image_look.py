"""Looking at a run as it goes: the held-out loss in its metrics, and a grid of samples in its folder."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from manylora.models.diffusion_base import Condition
from manylora.train.image_encoded import EncodedPictures
from manylora.train.image_model import ImageStudent
from manylora.train.image_samples import draw_samples, sample_prompts, save_grid
from manylora.training.loop import TrainingRun


class Look:
    """What a run is judged by, the same at every look.

    Args:
        held_out, rows: pictures that are not trained on.
        size: pixels of a sample's side.
    """

    def __init__(
        self,
        student: ImageStudent,
        held_out: EncodedPictures,
        rows: Sequence[int],
        run: TrainingRun,
        size: int,
    ) -> None:
        self.student, self.held_out, self.rows, self.run, self.size = student, held_out, rows, run, size
        config = student.config
        self.prompts = sample_prompts(config.sample_prompts, held_out, rows, config.num_samples)

    def begin(self) -> None:
        """Measure the base before the first step, or again what was measured at the step of the checkpoint."""
        if self.run.step == 0:
            self.run.notes["eval_loss_before"] = self.at_step()
        elif (
            self.run.step % self.student.config.eval_every == 0
            and self.run.step < self.run.config.num_steps
        ):
            # The log was cut back to before it, since a kill may have come in the middle of it.
            self.at_step()

    def at_step(self) -> float:
        """Measure and draw what the model is at this step; returns the held-out loss."""
        loss = self.student.held_out_loss(self.held_out, self.rows)
        self.run.metrics.append({"step": self.run.step, "eval_loss": loss})
        if self.prompts:
            self._draw_grid()
        return loss

    def _draw_grid(self) -> None:
        folder = self.run.folder / "samples"
        grid = [self._of_the_base, self._drawn()] if self.run.step else [self._of_the_base]
        save_grid(grid, folder / f"step-{self.run.step:06d}.png")
        lines = ["first row: the base; second row: with the adapter; from left to right:", *self.prompts]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @cached_property
    def _condition(self) -> Condition:
        return self.student.base.encode_prompts(self.prompts, height=self.size, width=self.size)

    @cached_property
    def _of_the_base(self) -> NDArray[np.uint8]:
        unet = self.student.base.unet
        unet.disable_adapters()
        try:
            return self._drawn()
        finally:
            unet.enable_adapters()

    def _drawn(self) -> NDArray[np.uint8]:
        config = self.student.config
        with self.student.not_in_training():
            return draw_samples(
                self.student.base,
                self._condition,
                self.size,
                config.sample_steps,
                config.sample_guidance,
                config.seed,
            )
