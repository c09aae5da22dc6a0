"""The consistency function: what a network says the end of the trajectory is, anchored at timestep 0."""

# Shapes: B rows of a batch; latents are [B, ...].

import torch
from torch import Tensor

SIGMA_DATA = 0.5
"""Spread of the data that the scalings assume; the value of all published latent consistency models."""

TIMESTEP_SCALING = 10.0
"""Factor on the timestep in the scalings. It makes them a switch: at the first solver step c_skip is below 1e-5."""


def boundary_scalings(
    t: Tensor, *, sigma_data: float = SIGMA_DATA, timestep_scaling: float = TIMESTEP_SCALING
) -> tuple[Tensor, Tensor]:
    """Return (c_skip, c_out) so that the consistency function is the identity at t = 0, exactly.

    With s = timestep_scaling * t: c_skip = sigma_data^2 / (s^2 + sigma_data^2), c_out = s / sqrt(s^2 + sigma_data^2).

    Args:
        t: timesteps on the training grid, any shape; not in seconds or [0, 1].
    Returns:
        Two tensors of t's shape, fp64.
    Source:
        Consistency models (Song et al. 2023), appendix C, as changed by latent consistency models (Luo et al. 2023),
        section 4.1 and its code: there is no sigma_data in c_out's numerator.
    """
    s = timestep_scaling * t.to(torch.float64)
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2).sqrt()


def consistency(z: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Return f(z, t) = c_skip(t) * z + c_out(t) * x0 [B, ...], with each row's own t.

    Args:
        z: [B, ...] the latent, x0: [B, ...] what the network denoises it to, t: [B] int64.
    Source:
        Latent consistency models (Luo et al. 2023), section 4.1.
    """
    c_skip, c_out = (
        c.reshape(-1, *[1] * (z.dim() - 1)).to(x0.device, x0.dtype) for c in boundary_scalings(t)
    )
    return c_skip * z + c_out * x0
