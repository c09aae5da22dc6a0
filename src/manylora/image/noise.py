"""The noise of a batch: each picture's from its own seed, so that the batch does not change it."""

# Shapes: B pictures of the batch.

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """One generator for each picture. What a picture draws, in which order, depends on its own course alone.

    Drawn on the CPU in fp32, so that device and dtype do not change it either. The order is that of diffusers'
    pipelines with a generator for each picture: the sample of the encoded picture to start from, the first latent,
    the noise between two steps.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Return standard normal noise shaped like [B, ...] for the latents of the batch: a `NoiseSource`."""
        drawn = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(like.device, like.dtype)
