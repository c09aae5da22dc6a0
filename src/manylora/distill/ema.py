"""A moving average of the weights that learn, and of those alone: for a LoRA, a few per cent of the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from manylora.errors import ConfigError


class EmaWeights:
    """average = decay * average + (1 - decay) * weight after each train step.

    Args:
        parameters: what learns, by name. The average starts as a copy of it.
        decay: in [0, 1); 0.95 in diffusers' scripts.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"EMA decay must lie in [0, 1), got {decay}")
        self.parameters, self.decay = dict(parameters), decay
        self.average: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights."""
        for name, weight in self.parameters.items():
            self.average[name].lerp_(weight, 1.0 - self.decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the parameters hold the average; nothing is copied, the tensors change places.

        Must not be entered between a forward pass with gradients and its backward pass.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self.parameters.items():
            weight.data, self.average[name] = self.average[name], weight.data
