"""Mixtures by merged weights, for measurements of many of them: a pass costs what the base's does.

It changes the base's weights and puts the very bits back, and all rows of a pass have one mixture. Serving does
neither; `refuse_if_unlike` checks that both draw the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from manylora.image.adapters import DiffusionModel
from manylora.lora.adapter import Adapter
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture, MixtureLike
from manylora.models.attach import attach
from manylora.models.diffusion_base import DiffusionBase


class MergedRows:
    """A base and adapters by name. Keeps the last mixture merged until another is asked for."""

    def __init__(self, base: DiffusionBase, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = dict(adapters)
        self._modules: dict[str, nn.Module] = dict(DiffusionModel(base).named_modules())
        self._merged = Mixture(())
        self._kept: dict[str, Tensor] = {}

    @contextmanager
    def rows(self, mixtures: Sequence[MixtureLike], *, copies: int = 1) -> Iterator[None]:
        """As `Attached.rows`, of one mixture for all rows."""
        (mixture,) = {Mixture.parse(mixture) for mixture in mixtures}
        if mixture != self._merged:
            self.restore()
            self._merge(mixture)
        yield

    @torch.no_grad()
    def restore(self) -> None:
        """Put the base's own bits back."""
        for site, weight in self._kept.items():
            self._weight(site).copy_(weight)
        self._kept, self._merged = {}, Mixture(())

    @torch.no_grad()
    def _merge(self, mixture: Mixture) -> None:
        for name, factor in mixture.weights:
            for site, pair in self.adapters[name].sites.items():
                weight = self._weight(site)
                self._kept.setdefault(site, weight.clone())
                delta = pair.scaling * (pair.lora_b.float() @ pair.lora_a.float())
                weight.add_(delta.view_as(weight), alpha=factor)
        self._merged = mixture

    def _weight(self, site: str) -> Tensor:
        weight = self._modules[site].weight
        assert isinstance(weight, Tensor)
        return weight


def refuse_if_unlike(
    base: DiffusionBase, merged: MergedRows, mixture: Mixture, tolerance: float = 1e-3
) -> float:
    """Return by how much merged weights and attached adapters differ in one pass; exit if that is not rounding."""
    library = Library()
    for name in mixture.names:
        library.add(name, merged.adapters[name])
    z = torch.randn(4, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 759, 499, 259])
    captions = ["a cat", "a house", "a tree", "a car"]
    found = []
    merged.restore()  # or what was asked for last would be added to what is attached
    with attach(DiffusionModel(base), library) as attached, torch.inference_mode():
        for lora in (attached, merged):
            with lora.rows([mixture] * 4):
                found.append(base.denoiser(base.encode_prompts(captions))(z, t).x0)
    merged.restore()
    away = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    if not away < tolerance:
        raise SystemExit(
            f"merged weights draw something else than attached adapters: {away:.2g} of the largest value"
        )
    return away
