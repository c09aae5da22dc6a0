"""Measure a table: for each row pictures of all prompts, what the judges say, and the figures with their intervals."""

# Shapes: N pictures, latents [N, 4, h, w], pixels [N, 3, H, W], D features.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from manylora.bench.image.cache import RowCache, key_of
from manylora.bench.image.intervals import (
    Interval,
    frechet_interval,
    kid_interval,
    mean_interval,
    rms_interval,
)
from manylora.bench.image.judge import Judge, Verdict
from manylora.bench.image.metrics import (
    Array,
    diversity,
    frechet_extrapolated,
    prompt_hits,
    squared_distances,
)
from manylora.bench.image.prompts import PromptSet
from manylora.bench.image.rows import TEACHER_STEPS, ImageRow
from manylora.bench.image.sample import RowSampler, Sampled
from manylora.errors import ConfigError
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture
from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base
from manylora.models.fingerprint import diffusion_fingerprint

OnProgress = Callable[[str, int], None]
"""(row, pictures done)."""


@dataclass(frozen=True)
class RowFigures:
    """What was measured on a row's pictures. None: it has no meaning there."""

    row: ImageRow
    kid: Interval
    frechet: Interval
    """With the bias of its sample; equal for sets of equal size."""
    frechet_extrapolated: float
    """Less the first order of that bias."""
    accuracy: Interval
    """Share of pictures on which the judge sees the prompt's names first."""
    accuracy_by_kind: Mapping[str, float]
    diversity: Interval | None
    """Mean distance in features of two pictures of a prompt."""
    paired_rmse: Interval | None
    """Latents' distance to the teacher's 50 steps from the same noise."""
    look_share: Interval | None
    """Share of pictures that the style judge assigns to the row's style."""
    style_accuracy: Interval | None
    """As accuracy, by the style judge, which has seen the styles."""
    seconds_per_picture: float | None
    """Of sampling, on the machine as it was; no timing of a quiet one."""
    lora_bytes: int | None = None
    """Of the row's adapters together. None: it has none, or the record is older than this column."""


@dataclass(frozen=True, eq=False)
class RealPictures:
    """Real ones that stand in rows of their own."""

    pixels: Tensor  # [L, 3, H, W]
    subjects: Sequence[Sequence[str]]
    kinds: Sequence[str]


@dataclass(frozen=True, eq=False)
class Labels:
    """What is on a row's pictures, and which belong together."""

    subjects: Sequence[Sequence[str]]
    kinds: Sequence[str]
    groups: Sequence[int]


class _Chance(TypedDict):
    """What intervals draw again, and by which seed."""

    seed: int
    within: bool


class Table:
    """What every row of a table shares. Use it as a context: it holds bases with adapters attached.

    Args:
        within: what intervals draw again, see `intervals`.
        pairs: measure distances to the teacher's pictures from the same noise, for which it has to draw them.
    """

    def __init__(
        self,
        base: DiffusionBase,
        library: Library | None,
        judge: Judge,
        style_judge: Judge | None,
        prompts: PromptSet,
        reference: Tensor,  # [M, 3, H, W]  held-out real pictures
        real: RealPictures | None,
        cache: RowCache,
        *,
        guidance: float,
        batch: int = 32,
        seed: int = 0,
        within: bool = False,
        pairs: bool = True,
    ) -> None:
        self.base, self.judge, self.style_judge = base, judge, style_judge
        self.prompts, self.cache = prompts, cache
        self._library, self._batch = library, batch
        self._seed, self._chance, self._pairs = seed, _Chance(seed=seed, within=within), pairs
        self._teacher = ImageRow(label="teacher", steps=TEACHER_STEPS, guidance=guidance)
        self._real = real
        self.num_reference, self._reference = len(reference), judge.verdict(reference).features
        self._samplers: dict[str, RowSampler] = {}
        self._bases: dict[str, dict[str, Any]] = {}  # what latents depend on of each
        self._held = ExitStack()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def figures(self, row: ImageRow, on_progress: OnProgress = lambda row, done: None) -> RowFigures:
        """Measure a row, or read what is kept of it."""
        labels = self._labels(row)
        groups, chance = labels.groups, self._chance
        sampled = None if row.source != "sampler" else self._sampled(row, on_progress)
        verdict = self._verdict(row, self.judge, sampled)
        hits = self._hits(self.judge, verdict, labels)
        apart = diversity(verdict.features, groups)
        return RowFigures(
            row=row,
            kid=kid_interval(verdict.features, self._reference, groups, **chance),
            frechet=frechet_interval(verdict.features, self._reference, groups, **chance),
            frechet_extrapolated=frechet_extrapolated(
                verdict.features, self._reference, groups=groups, seed=self._seed
            ),
            accuracy=mean_interval(hits, groups, **chance),
            accuracy_by_kind=_by_kind(hits, labels.kinds),
            diversity=None if np.isnan(apart).any() else mean_interval(apart, groups, **chance),
            paired_rmse=None if sampled is None else self._paired(row, sampled, on_progress),
            seconds_per_picture=None if sampled is None else sampled.seconds / len(self.prompts),
            lora_bytes=self._bytes(row),
            **self._of_style(row, labels, sampled),
        )

    def pixels(self, row: ImageRow) -> Tensor:
        """Return the row's pictures [N, 3, H, W] in [-1, 1]."""
        return self._pixels(row, self._sampled(row) if row.source == "sampler" else None)

    def picture(self, row: ImageRow, index: int) -> Tensor:
        """Return one picture [3, H, W] in [-1, 1] of a sampled row."""
        return decoded(self._sampler(row.base).base, self._sampled(row).latents[index : index + 1], 1)[0]

    def _bytes(self, row: ImageRow) -> int | None:
        names = Mixture.parse(row.lora or None).names
        if not names or self._library is None:
            return None
        return sum(self._library.load(name).num_bytes for name in names)

    def _sampled(self, row: ImageRow, on_progress: OnProgress = lambda row, done: None) -> Sampled:
        def make() -> Sampled:
            return self._sampler(row.base).run(row, self.prompts, lambda done: on_progress(row.label, done))

        return self.cache.sampled(self._key(row), make)

    def _verdict(self, row: ImageRow, judge: Judge, sampled: Sampled | None) -> Verdict:
        if row.source == "sampler":
            return self.cache.verdict(self._key(row), judge, lambda: self._pixels(row, sampled))
        return judge.verdict(self._pixels(row, None))

    def _pixels(self, row: ImageRow, sampled: Sampled | None) -> Tensor:
        base = self._sampler(row.base).base
        if sampled is not None:
            return decoded(base, sampled.latents, self._batch)
        if self._real is None:
            raise ConfigError(f"row {row.label!r} needs real pictures that are not the reference")
        if row.source == "real":
            return self._real.pixels
        parts = [base.encode_images(part) for part in torch.split(self._real.pixels, self._batch)]
        return decoded(base, torch.cat(parts), self._batch)

    def _paired(self, row: ImageRow, sampled: Sampled, on_progress: OnProgress) -> Interval | None:
        if not self._pairs or not row.is_paired:
            return None
        teacher = self._sampled(self._teacher, on_progress)
        squares = squared_distances(sampled.latents.numpy(), teacher.latents.numpy())
        return rms_interval(squares, self.prompts.prompts, **self._chance)

    def _of_style(
        self, row: ImageRow, labels: Labels, sampled: Sampled | None
    ) -> dict[str, Interval | None]:
        judge, share = self.style_judge, None
        if judge is None:
            return {"look_share": None, "style_accuracy": None}
        verdict = self._verdict(row, judge, sampled)
        if row.look is not None:
            if row.look not in judge.looks:
                raise ConfigError(f"the style judge knows the looks {list(judge.looks)}, not {row.look!r}")
            assigned = verdict.looks.argmax(axis=1) == judge.looks.index(row.look)
            share = mean_interval(assigned.astype(np.float64), labels.groups, **self._chance)
        hits = self._hits(judge, verdict, labels)
        return {
            "look_share": share,
            "style_accuracy": mean_interval(hits, labels.groups, **self._chance),
        }

    def _labels(self, row: ImageRow) -> Labels:
        if row.source == "sampler":
            return Labels(self.prompts.subjects, self.prompts.kinds, self.prompts.prompts)
        if self._real is None:
            raise ConfigError(f"row {row.label!r} needs real pictures that are not the reference")
        return Labels(self._real.subjects, self._real.kinds, _numbered(self._real.subjects))

    def _hits(self, judge: Judge, verdict: Verdict, labels: Labels) -> Array:
        return prompt_hits(verdict.names, [judge.subjects(names) for names in labels.subjects])

    def _sampler(self, path: str) -> RowSampler:
        if path not in self._samplers:
            base = self.base if not path else load_diffusion_base(path)
            sampler = RowSampler(base, self._library, self._batch)
            self._samplers[path] = self._held.enter_context(sampler)
            self._bases[path] = {"unet": base.content_hash(), **diffusion_fingerprint(base)}
        return self._samplers[path]

    def _key(self, row: ImageRow) -> str:
        """What the row's latents depend on; its name is no part of it."""
        self._sampler(row.base)
        mixture = Mixture.parse(row.lora or None)
        return key_of(
            {
                "base": self._bases[row.base],
                "prompts": self.prompts.content_hash,
                "sampler": [row.sampler, row.steps, row.guidance],
                "loras": [[self._identity(name), weight] for name, weight in mixture.weights],
            }
        )

    def _identity(self, name: str) -> str:
        if self._library is None:
            raise ConfigError(f"a row names the LoRA {name!r}, but no library was given")
        return str(self._library.identity(self._library.locate(name)) or self._library.load(name).identity)


def decoded(base: DiffusionBase, latents: Tensor, batch: int) -> Tensor:
    """Return pictures [N, 3, H, W] in [-1, 1]."""
    return torch.cat([base.decode_latents(part) for part in torch.split(latents, batch)]).clamp(-1, 1)


def _numbered(values: Sequence[Sequence[str]]) -> list[int]:
    """Return a number for each distinct value."""
    numbers: dict[tuple[str, ...], int] = {}
    return [numbers.setdefault(tuple(value), len(numbers)) for value in values]


def _by_kind(hits: Array, kinds: Sequence[str]) -> dict[str, float]:
    return {kind: float(hits[np.asarray(kinds) == kind].mean()) for kind in dict.fromkeys(kinds)}
