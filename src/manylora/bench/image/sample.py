"""From a row of a table to the latents of its pictures: the engine's samplers and attached LoRAs, in large batches.

The engine itself gives finished pictures; a paired distance needs latents. A picture here is the engine's, to rounding.
"""

# Shapes: N pictures, B of a batch; latents [N, 4, h, w].

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.bench.image.prompts import PromptSet
from manylora.bench.image.rows import ImageRow
from manylora.diffusion import Denoiser, last_latent
from manylora.errors import ConfigError
from manylora.image.adapters import DiffusionModel
from manylora.image.noise import SeededNoise
from manylora.image.params import ImageParams
from manylora.image.sampler import sample, timesteps_of
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture
from manylora.models.attach import Attached, attach
from manylora.models.diffusion_base import Condition, DiffusionBase

ADAPTER_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Sampled:
    """The latents of a row's pictures."""

    latents: Tensor  # [N, 4, h, w]  fp32
    seconds: float
    """Spent in the UNet and the text encoders, all pictures together."""


class RowSampler:
    """One base with adapters attached; use it as a context, or close it."""

    def __init__(self, base: DiffusionBase, library: Library | None, batch: int = 32) -> None:
        self.base, self.batch = base, batch
        self._lora: Attached | None = None
        if library is not None:
            self._lora = attach(DiffusionModel(base), library, memory_bytes=ADAPTER_BYTES, name=base.path)

    def __enter__(self) -> RowSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the adapters off the base."""
        if self._lora is not None:
            self._lora.detach()

    @torch.inference_mode()
    def run(
        self, row: ImageRow, prompts: PromptSet, on_progress: Callable[[int], None] = lambda done: None
    ) -> Sampled:
        """Sample every picture of the prompts as the row says.

        Args:
            on_progress: told how many pictures are done.
        """
        started, parts = time.perf_counter(), []
        for start in range(0, len(prompts), self.batch):
            stop = min(start + self.batch, len(prompts))
            parts.append(self._batch(row, prompts.captions[start:stop], prompts.seeds[start:stop]))
            on_progress(stop)
        return Sampled(torch.cat(parts).float().cpu(), time.perf_counter() - started)

    def _batch(self, row: ImageRow, captions: tuple[str, ...], seeds: tuple[int, ...]) -> Tensor:
        base, is_guided = self.base, row.guidance != 1.0
        mixture, count = Mixture.parse(row.lora or None), len(captions)
        with self._mixed(mixture, count, 1):
            condition = base.encode_prompts(captions)
        unconditional = base.unconditional() if is_guided else None
        noise = SeededNoise(seeds)
        z = noise(torch.empty(count, *base.latent_shape(), device=base.device))
        timesteps = timesteps_of(_params(row), base.schedule.num_timesteps)
        denoise = _denoiser(base, condition, unconditional, row.guidance)
        with self._mixed(mixture, count, 2 if is_guided else 1):
            return last_latent(sample(row.sampler, denoise, base.schedule, z, timesteps, noise))

    def _mixed(self, mixture: Mixture, count: int, copies: int) -> AbstractContextManager[None]:
        if not mixture:
            return nullcontext()
        if self._lora is None:
            raise ConfigError(f"row with the mixture '{mixture}', but no library of LoRAs was given")
        return self._lora.rows([mixture] * count, copies=copies)


def _denoiser(
    base: DiffusionBase, condition: Condition, unconditional: Condition | None, guidance: float
) -> Denoiser:
    if unconditional is None:
        return base.denoiser(condition)
    return base.guided_denoiser(condition, unconditional, guidance)


def _params(row: ImageRow) -> ImageParams:
    return ImageParams(sampler=row.sampler, steps=row.steps, guidance=row.guidance)
