"""A batch of pictures on its way from noise to pixels, one call of the UNet a step."""

# Shapes: B pictures, C channels, h x w of the latent, H x W pixels. With guidance a pass has 2 B rows: all prompts,
# then all negative prompts.

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from manylora.diffusion import Denoised, Denoiser, add_noise, guidance_weight, guide
from manylora.image.noise import SeededNoise
from manylora.image.request import ImageRequest
from manylora.image.sampler import sample
from manylora.models.attach import Attached
from manylora.models.diffusion_base import Condition, DiffusionBase


class ImageBatch:
    """Begins when it is made and holds its adapters until closed. All of it runs under `torch.inference_mode`."""

    def __init__(self, base: DiffusionBase, lora: Attached, requests: Sequence[ImageRequest]) -> None:
        """
        Args:
            requests: of one batch key, with mixtures that fit the adapters' memory together.
        """
        self.requests = tuple(requests)
        self.num_done = 0
        """Steps done."""
        self._base = base
        self._held = ExitStack()
        key = requests[0].batch_key
        copies = 2 if key.is_guided else 1
        self._held.enter_context(lora.rows([request.mixture for request in requests], copies=copies))
        try:
            condition = _condition(base, requests)
            noise = SeededNoise([_seed(request) for request in requests])
            starts = [_first_latent(base, *pair) for pair in zip(requests, noise.generators, strict=True)]
            self._z = torch.stack(starts).to(base.device)  # [B, C, h, w]
            denoise = base.denoiser(condition)
            if key.is_guided:
                denoise = _guided(denoise, _guidance_weights(requests, base.device))
            self._steps = sample(key.sampler, denoise, base.schedule, self._z, key.timesteps, noise)
        except BaseException:
            self.close()
            raise

    @property
    def num_steps(self) -> int:
        return len(self.requests[0].timesteps)

    def advance(self) -> list[bool]:
        """Do the next step; returns for each picture whether its latent is finite yet."""
        self._z = next(self._steps).z
        self.num_done += 1
        return _is_finite(self._z)

    def pixels(self) -> Tensor:
        """Return the pictures as they are now [B, 3, H, W], in -1..1 but for the decoder's overshoot."""
        return self._base.decode_latents(self._z)

    def close(self) -> None:
        """Let the adapters go."""
        self._held.close()


def _condition(base: DiffusionBase, requests: Sequence[ImageRequest]) -> Condition:
    """What the rows of a pass are told: [B] rows, or [2 B] with guidance."""
    key = requests[0].batch_key
    negatives = [request.params.negative_prompt for request in requests] if key.is_guided else []
    texts = [*(request.prompt for request in requests), *(negative or "" for negative in negatives)]
    # In one call, so that the rows of the text encoders are the rows of the UNet and carry the same mixtures.
    condition = base.encode_prompts(texts, height=key.height, width=key.width)
    absent = [len(requests) + i for i, negative in enumerate(negatives) if negative is None]
    if not (base.empty_is_zero and absent):
        return condition
    embeddings, pooled = condition.embeddings.clone(), condition.pooled
    embeddings[absent] = 0
    if pooled is not None:
        pooled = pooled.clone()
        pooled[absent] = 0
    return replace(condition, embeddings=embeddings, pooled=pooled)


def _first_latent(base: DiffusionBase, request: ImageRequest, generator: torch.Generator) -> Tensor:
    """Noise, or the encoded picture with as much noise as the first timestep has [C, h, w]."""
    key, factor = request.batch_key, base.latent_factor
    encoded = None if request.image is None else base.encode_images(request.image[None], generator)
    epsilon = torch.randn(
        1, base.latent_channels, key.height // factor, key.width // factor, generator=generator
    )
    if encoded is None:
        return epsilon[0]
    level = base.schedule.level(torch.tensor([key.timesteps[0]]), epsilon)
    return add_noise(encoded.to(epsilon), epsilon, level)[0]


def _guided(denoise: Denoiser, weight: Tensor) -> Denoiser:
    """Guide each picture by its own weight [B, 1, 1, 1]; one call of `denoise`, on 2 B rows."""

    def both(z: Tensor, t: Tensor) -> Denoised:
        now = denoise(torch.cat([z, z]), torch.cat([t, t]))
        (x0, x0_negative), (epsilon, epsilon_negative) = now.x0.chunk(2), now.epsilon.chunk(2)
        return guide(Denoised(x0, epsilon), Denoised(x0_negative, epsilon_negative), weight)

    return both


def _guidance_weights(requests: Sequence[ImageRequest], device: torch.device) -> Tensor:
    weights = [guidance_weight(request.params.guidance) for request in requests]
    return torch.tensor(weights, dtype=torch.float32, device=device).reshape(-1, 1, 1, 1)


def _seed(request: ImageRequest) -> int:
    assert request.params.seed is not None, "intake gives every picture a seed"
    return request.params.seed


def _is_finite(values: Tensor) -> list[bool]:
    return torch.isfinite(values).flatten(1).all(dim=1).tolist()
