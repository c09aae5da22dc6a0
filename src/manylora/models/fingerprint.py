"""What a base is known by, so that no run goes on with another one that lies in its place. Knows no file."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from manylora.models.diffusion_base import DiffusionBase

_LATENT_SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def diffusion_fingerprint(base: DiffusionBase) -> dict[str, Any]:
    """Return what fixes a run beside the UNet's weights, as JSON gives it back."""
    alpha_bar = base.schedule.alpha_bar
    quarters = torch.linspace(0, len(alpha_bar) - 1, 5).round().long()
    return {
        "encoders_hash": encoders_hash(base),
        "empty_is_zero": base.empty_is_zero,
        "prediction": str(base.prediction),
        "num_timesteps": len(alpha_bar),
        # A few, rounded: a machine that computes the last bits otherwise may go on with the run.
        "alpha_bar": [f"{value:.4g}" for value in alpha_bar[quarters].tolist()],
    }


def encoders_hash(base: DiffusionBase) -> str:
    """Hex hash of what makes latents of pictures and conditions of texts: weights, and the latents' scale."""
    scale = [base.vae.config.get(name) for name in _LATENT_SCALE]
    told = f"{weights_hash(base.vae, *base.text_encoders)} {scale}"
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def weights_hash(*networks: nn.Module) -> str:
    """Hex hash of weights as loaded, by name; about a second for each GB."""
    digest = hashlib.blake2b(digest_size=16)
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy(force=True).data)
    return digest.hexdigest()
