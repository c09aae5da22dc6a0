"""How large the weights of a diffusion model's sites are: what a delta is measured against."""

# Shapes: O out-features, D in-features (of a conv: in_channels * kernel_h * kernel_w).

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from manylora.lora.diagnose import BaseNorm
from manylora.models.base_norms import spectral_norm


def module_norms(model: nn.Module, sites: Collection[str]) -> dict[str, BaseNorm]:
    """Return the norms of the weights of a module's sites, each Linear or Conv2d.

    Args:
        sites: module paths, as `Attached.sites` gives them.
    """
    norms = {}
    for name in sites:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        matrix = weight.detach().flatten(1).float()  # [O, D]
        norms[name] = BaseNorm(float(matrix.norm()), spectral_norm(matrix))
    return norms
