"""Looks at a student as it learns: its distance to the teacher as one number, and pictures of both."""

# Shapes: P rows of a look; latents are [P, 4, h, w].

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from torch import Tensor

from manylora.distill.config import DistillConfig
from manylora.distill.networks import UnetStudent, UnetTeacher
from manylora.distill.pictures import Pictures, RowOrder, batch_of
from manylora.distill.probe import Probe, Sampling, kept_tensor, starting_noise
from manylora.distill.samples import save_samples
from manylora.models.diffusion_base import DiffusionBase

_MAX_SAMPLE_ROWS = 8
"""Pictures in a grid, however many a look measures."""


class Looks:
    """The same captions and noise at every look of a run."""

    def __init__(
        self,
        config: DistillConfig,
        base: DiffusionBase,
        pictures: Pictures,
        sampling: Sampling,
        latent_shape: tuple[int, int, int],
    ) -> None:
        self.config, self.base, self.pictures = config, base, pictures
        self.sampling, self.latent_shape = sampling, latent_shape
        num_rows = min(config.eval_rows, len(pictures))
        self.rows = RowOrder(len(pictures), num_rows, config.seed).rows(0)
        """Pictures whose captions are drawn."""
        self._probe: Probe | None = None

    def prepare(self, teacher: UnetTeacher, fingerprint: Mapping[str, Any]) -> None:
        """Find where the teacher ends; a run that goes on takes it from its folder."""
        _, condition = batch_of(self.pictures, self.rows, self.base.device)
        noise = starting_noise(len(self.rows), self.latent_shape, self.config.seed).to(self.base.device)
        made_of = blake2b(json.dumps([fingerprint, self.rows]).encode(), digest_size=16).hexdigest()
        end = kept_tensor(
            self.config.run_folder / "teacher.safetensors",
            made_of,
            lambda: self.sampling.teacher_end(teacher, noise, condition),
        )
        self._probe = Probe(noise, condition, end.to(noise))

    def look(self, student: UnetStudent, step: int) -> float:
        """Return the paired distance, in as many steps as the objective can be paired in, and draw the student."""
        assert self._probe is not None
        probe, seed = self._probe, self.config.seed
        num_paired = self.sampling.objective.num_paired_steps
        ends = {
            num_steps: self.sampling.student_end(student, probe.noise, probe.condition, num_steps, seed)
            for num_steps in {num_paired, *self._drawn_steps()}
        }
        self._draw(probe, ends, step)
        return probe.paired_rmse(ends[num_paired])

    def _drawn_steps(self) -> list[int]:
        steps, phases = self.config.sample_steps, self.sampling.objective.num_paired_steps
        is_shown = self.config.objective == "lcm" or phases in steps
        return [*steps] if is_shown else sorted([*steps, phases])

    def _draw(self, probe: Probe, ends: Mapping[int, Tensor], step: int) -> None:
        shown = slice(0, _MAX_SAMPLE_ROWS)
        teacher = f"teacher, {self.config.num_solver_steps} steps at guidance {self.config.guidance:g}"
        columns = {teacher: self.base.decode_latents(probe.teacher_end[shown])}
        for num_steps in self._drawn_steps():
            columns[f"student, {num_steps} steps"] = self.base.decode_latents(ends[num_steps][shown])
        captions = [
            self.pictures.captions[int(self.pictures.caption_rows[row])] for row in self.rows[shown]
        ]
        save_samples(columns, captions, self.config.run_folder / "samples" / f"step-{step:08d}.png")
