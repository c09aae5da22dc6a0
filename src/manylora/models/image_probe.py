"""What a mixture does to a denoiser on a few captions, beside what each of its parts does alone.

Everything is measured against a reference: the base, or the base with the acceleration LoRA that the mixture holds,
since a few-step LoRA is meant to change every prediction and the question is what the others do to it.
"""

# Shapes: C captions, L noise levels, R = L * C rows of a variant, level by level; latents are [.., 4, h, w].

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manylora.diffusion import add_noise, ddim_step, last_latent, lcm_timesteps, solve, trailing_timesteps
from manylora.errors import RequestError
from manylora.lora.diagnose import ratio
from manylora.lora.mixture import Mixture, MixtureLike
from manylora.models.diffusion_base import Condition, DiffusionBase

PROBE_CAPTIONS = ("a cat", "a house", "a tree", "a car", "an apple", "a fish", "a clock", "a sunflower")
"""Plain things that look different."""

NUM_LEVELS = 4
"""Noise levels: those at which a few-step sampler of four steps asks."""

PICTURE_STEPS = 8
"""Of the base's own pictures, which are noised again to make latents that a denoiser meets."""

MAX_ROWS = 32
"""Of a forward pass."""


class RunsMixtures(Protocol):
    """What a probe asks of adapters on a base; `Attached` is one."""

    def rows(self, mixtures: Sequence[MixtureLike], *, copies: int = 1) -> AbstractContextManager[None]:
        """Let the base run these mixtures, one a row of its batch, while the context is open."""
        ...


@dataclass(frozen=True, slots=True)
class DenoiserChange:
    """How one variant denoises, against the reference; of predicted clean latents x0 unless said otherwise."""

    divergence: float
    """`||x0 - x0_ref|| / ||x0_ref||`, over all levels and captions; inf where the variant's are not finite."""

    divergence_by_level: tuple[float, ...]
    """The same at each noise level, the noisiest first."""

    prompt_disagreement: float
    """1 - cosine of what the caption changes, in the variant and in the reference: x0 less its mean over captions of
    the same noisy latent. 0: prompts mean what they meant; 1: nothing of it is left."""

    prompt_gain: float
    """How much the caption changes in the variant, over how much it does in the reference."""

    roughness: float
    """`|log|` of the ratio of differences between neighbouring latent pixels: speckles, or blur."""

    residual: float
    """`||x0(z') - x0(z)|| / ||x0(z)||`, z' one step further down the variant's own trajectory. 0 for a perfect few-step
    model; what has broken its self-consistency raises it."""


@dataclass(frozen=True)
class ImageProbeResult:
    """What the captions showed."""

    reference: str
    """The mixture that everything is measured against."""

    num_rows: int
    """Predictions compared of each variant."""

    timesteps: tuple[int, ...]
    reference_residual: float
    mixture: DenoiserChange
    parts: tuple[DenoiserChange, ...]
    """Each adapter alone beside the reference, at its weight in the mixture."""

    non_additivity: float | None
    """`||d - sum_i d_i|| / ||sum_i d_i||`, d the change of x0 by the mixture, d_i by part i alone. None for a single
    part, or where the parts change nothing."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one variant says at the probe's latents."""

    x0: Tensor  # [L, C, 4, h, w]
    residual: float


class ImageProbe:
    """A base, captions, and latents noised by fixed seeds; asked for one mixture after the other.

    Args:
        lora: what `attach` gave for the base, with the adapters in its library.
        reference: what mixtures are measured against, and what their parts are beside: acceleration LoRAs, or nothing.
        guidance: of the base's own pictures.
    Raises:
        RequestError: fewer than two captions: what a prompt changes cannot be told.
        AdapterError: an adapter does not fit the base.
    """

    def __init__(
        self,
        base: DiffusionBase,
        lora: RunsMixtures,
        reference: MixtureLike = None,
        *,
        captions: Sequence[str] = PROBE_CAPTIONS,
        guidance: float = 2.0,
        seed: int = 0,
    ) -> None:
        if len(captions) < 2:
            raise RequestError(f"a probe needs at least 2 captions, got {len(captions)}")
        self._base, self._lora, self._captions = base, lora, tuple(captions)
        self._reference = Mixture.parse(reference)
        self.timesteps = tuple(lcm_timesteps(NUM_LEVELS, num_timesteps=base.schedule.num_timesteps))
        draw = torch.Generator().manual_seed(seed)
        self._latents = self._noisy(self._pictures(guidance, draw), draw)  # [L, 4, h, w]
        self._seen_reference = self._see(self._reference)

    def change(self, mixture: MixtureLike) -> DenoiserChange:
        """Return what a mixture, beside the reference, does."""
        return self._change(self._see(self._beside(Mixture.parse(mixture))))

    def result(self, mixture: MixtureLike) -> ImageProbeResult:
        """Return what a mixture, beside the reference, and each of its parts do."""
        weights = Mixture.parse(mixture).weights
        whole = self._see(self._beside(Mixture(weights)))
        parts = [self._see(self._beside(Mixture((part,)))) for part in weights] if len(weights) > 1 else []
        change, changes = self._change(whole), [self._change(seen) for seen in parts]
        return ImageProbeResult(
            reference=str(self._reference),
            num_rows=len(self.timesteps) * len(self._captions),
            timesteps=self.timesteps,
            reference_residual=self._seen_reference.residual,
            mixture=change,
            parts=tuple(changes or [change]),
            non_additivity=self._non_additivity(whole, parts) if parts else None,
        )

    def _beside(self, mixture: Mixture) -> Mixture:
        return Mixture((*self._reference.weights, *mixture.weights))

    @torch.inference_mode()
    def _pictures(self, guidance: float, draw: torch.Generator) -> Tensor:  # [L, 4, h, w]
        base, captions = self._base, [self._captions[i % len(self._captions)] for i in range(NUM_LEVELS)]
        condition, unconditional = base.encode_prompts(captions), base.unconditional()
        z = torch.randn(len(captions), *base.latent_shape(), generator=draw).to(base.device)
        denoise = base.guided_denoiser(condition, unconditional, guidance)
        timesteps = trailing_timesteps(PICTURE_STEPS, base.schedule.num_timesteps)
        return last_latent(solve(denoise, base.schedule, z, timesteps, ddim_step))

    def _noisy(self, pictures: Tensor, draw: torch.Generator) -> Tensor:  # [L, 4, h, w]
        """Each picture at a noise level of its own."""
        level = self._base.schedule.level(torch.tensor(self.timesteps, device=pictures.device), pictures)
        return add_noise(pictures, torch.randn(pictures.shape, generator=draw).to(pictures), level)

    @torch.inference_mode()
    def _see(self, mixture: Mixture) -> _Seen:
        num_captions = len(self._captions)
        with self._lora.rows([mixture] * num_captions):
            condition = self._base.encode_prompts(self._captions)
        t = torch.tensor(self.timesteps, device=self._latents.device).repeat_interleave(num_captions)  # [R]
        z = self._latents.repeat_interleave(num_captions, dim=0)  # [R, 4, h, w]
        x0, z_next = self._step(mixture, z, t, condition)
        # The last level has no next one among the probe's.
        stay = slice(num_captions, None)
        further, _ = self._step(mixture, z_next[: len(z) - num_captions], t[stay], condition)
        before = x0[: len(z) - num_captions]
        residual = ratio(float((further - before).norm()), float(before.norm()))
        return _Seen(x0.reshape(len(self.timesteps), num_captions, *x0.shape[1:]), residual)

    def _step(
        self, mixture: Mixture, z: Tensor, t: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:  # [R, 4, h, w] each
        """x0 as seen from z, and where a DDIM step with it leads: to the level after t's."""
        schedule, ends, landed = self._base.schedule, [], []
        after = dict(zip(self.timesteps, (*self.timesteps[1:], 0), strict=True))
        for start in range(0, len(z), MAX_ROWS):
            part = slice(start, start + MAX_ROWS)
            rows = torch.arange(len(z))[part] % len(condition)
            with self._lora.rows([mixture] * len(rows)):
                now = self._base.denoiser(condition.rows(rows))(z[part], t[part])
            t_next = torch.tensor([after[int(at)] for at in t[part]], device=t.device)
            level, to = schedule.level(t[part], z), schedule.level(t_next, z)
            ends.append(now.x0)
            landed.append(ddim_step(z[part], now, level, to))
        return torch.cat(ends), torch.cat(landed)

    def _change(self, seen: _Seen) -> DenoiserChange:
        wanted, found = self._seen_reference.x0, seen.x0
        away = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)  # [L]
        of_caption, of_caption_wanted = (x - x.mean(dim=1, keepdim=True) for x in (found, wanted))
        norms = float(of_caption.norm()), float(of_caption_wanted.norm())
        cosine = float((of_caption * of_caption_wanted).sum()) / (norms[0] * norms[1] or 1.0)
        return DenoiserChange(
            divergence=_finite(ratio(float((found - wanted).norm()), float(wanted.norm()))),
            divergence_by_level=tuple(map(_finite, away.tolist())),
            prompt_disagreement=_finite(1.0 - cosine),
            prompt_gain=_finite(ratio(*norms)),
            roughness=_finite(abs(math.log(_roughness(found) / _roughness(wanted)))),
            residual=_finite(seen.residual),
        )

    def _non_additivity(self, whole: _Seen, parts: Sequence[_Seen]) -> float | None:
        reference = self._seen_reference.x0
        additive = torch.stack([part.x0 - reference for part in parts]).sum(dim=0)
        total = float(additive.norm())
        return _finite(float((whole.x0 - reference - additive).norm()) / total) if total else None


def _roughness(x0: Tensor) -> float:  # [.., h, w]
    across = x0.diff(dim=-1).square().mean() + x0.diff(dim=-2).square().mean()
    # A latent without any detail is as rough as rounding, not infinitely smoother than others.
    return float(across.sqrt().clamp_min(1e-6))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
