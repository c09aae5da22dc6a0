"""One picture that was asked for: a request of n pictures becomes n of these, each with its own seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from manylora.image.params import ImageParams
from manylora.lifecycle import Lifecycle
from manylora.lora.mixture import Mixture

if TYPE_CHECKING:
    from torch import Tensor


class BatchKey(NamedTuple):
    """What pictures of one batch have in common; prompts, seeds, mixtures and guidance scales may differ."""

    width: int
    height: int
    sampler: str
    timesteps: tuple[int, ...]
    is_guided: bool


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ImageRequest:
    """A picture to be made. Every parameter has its value: size and seed are no longer None."""

    request_id: str
    index: int
    """0 .. n - 1 among the pictures of the request."""
    prompt: str
    params: ImageParams
    mixture: Mixture
    timesteps: tuple[int, ...]
    """At which the network is asked, falling."""
    image: Tensor | None = None  # [3, H, W]  in -1..1, the picture to start from
    lifecycle: Lifecycle = field(default_factory=Lifecycle)

    @property
    def batch_key(self) -> BatchKey:
        params = self.params
        assert params.width is not None, "intake gives every picture its size"
        assert params.height is not None
        return BatchKey(params.width, params.height, params.sampler, self.timesteps, params.is_guided)
