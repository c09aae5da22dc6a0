"""What learns: a LoRA in the UNet, or all of its weights. Each also knows how the UNet is the teacher.

The LoRA's teacher is the same UNet with the LoRA off, so it costs no memory. Knows no data, loss, optimizer or file.
"""

# Shapes: R rank, D in-features (of a conv: in_channels * kernel_h * kernel_w), O out-features.

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from manylora.diffusion import guidance_weight
from manylora.distill.config import LCM_TARGETS, DistillConfig
from manylora.errors import ConfigError
from manylora.lora.adapter import Adapter, LoraPair

MAIN, GUIDANCE = "default", "guidance"
"""The adapters in the UNet: what the student always has, and what is added by the guidance scale."""


class Learner(Protocol):
    """A UNet of which something learns."""

    unet: Any
    """The student."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, fp32, by name."""
        ...

    def teacher(self) -> AbstractContextManager[Any]:
        """Give, within, the UNet as it was before anything was learnt."""
        ...

    def set_w(self, w: Tensor) -> None:
        """Tell the student the guidance weight [B] of its next pass; it is the same for all rows."""
        ...


class DistilledLora:
    """A UNet with a LoRA that learns.

    Args:
        unet: frozen; PEFT wraps its layers in place.
    Raises:
        ConfigError: a target that no module of the UNet answers to.
    """

    def __init__(self, unet: Any, config: DistillConfig) -> None:
        from peft.tuners.lora import LoraLayer

        _refuse_unknown_targets(unet, config.targets)
        self.unet, self.config = unet.requires_grad_(False), config
        self.names = (MAIN,) if config.max_guidance is None else (MAIN, GUIDANCE)
        torch.manual_seed(config.seed)
        with warnings.catch_warnings():
            # PEFT asks whether a second adapter in the UNet is meant. It is.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            for name in self.names:
                unet.add_adapter(_lora_config(config), name)
        unet.set_adapter(list(self.names))
        self._layers: dict[str, Any] = {
            name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)
        }
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.unet.named_parameters() if ".lora_" in name}

    @contextmanager
    def teacher(self) -> Iterator[Any]:
        self._enable(False)
        try:
            yield self.unet
        finally:
            self._enable(True)

    def set_w(self, w: Tensor) -> None:
        if GUIDANCE not in self.names:
            return
        weight = guidance_share(self.config, float(w[0]))
        for layer in self._layers.values():
            layer.scaling[GUIDANCE] = layer.scaling[MAIN] * weight

    def adapters(self, dtype: torch.dtype = torch.float32) -> dict[str, Adapter]:
        """Return a copy of what was learnt, by adapter, to be used outside PEFT."""
        return {name: self._adapter(name, dtype) for name in self.names}

    def _adapter(self, name: str, dtype: torch.dtype) -> Adapter:
        base_name = self.config.base_name or self.config.base
        pairs = {
            site: _pair(layer, name, self._scaling(layer), dtype) for site, layer in self._layers.items()
        }
        return Adapter(pairs, name=self.config.out.name, base_model=base_name)

    def _scaling(self, layer: Any) -> float:
        scaling: float = layer.scaling[MAIN]
        return scaling

    def _enable(self, on: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(on)


class DistilledUnet:
    """A UNet of which everything learns, beside a frozen copy as its teacher."""

    def __init__(self, unet: Any) -> None:
        self._teacher = copy.deepcopy(unet).requires_grad_(False)
        self.unet = unet.float().requires_grad_(True)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.unet.named_parameters())

    def teacher(self) -> AbstractContextManager[Any]:
        return nullcontext(self._teacher)

    def set_w(self, w: Tensor) -> None:
        """One fixed guidance is all that it learns."""


def guidance_share(config: DistillConfig, w: float) -> float:
    """Return the weight of the guidance adapter at w: -1 at the least scale, 1 at the greatest, linear between."""
    assert config.max_guidance is not None
    low, high = guidance_weight(config.guidance), guidance_weight(config.max_guidance)
    return (2 * w - low - high) / (high - low)


def _lora_config(config: DistillConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.resolved_alpha,
        target_modules=list(config.targets),
        bias="none",
    )


def _pair(layer: Any, name: str, scaling: float, dtype: torch.dtype) -> LoraPair:
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    kernel_size = tuple(lora_a.shape[2:]) if lora_a.dim() == 4 else None
    # A conv's lora_A is [R, channels, height, width], its lora_B [O, R, 1, 1].
    return LoraPair(
        lora_a.detach().flatten(1).to("cpu", dtype, copy=True),
        lora_b.detach().flatten(1).to("cpu", dtype, copy=True),
        scaling,
        kernel_size,
    )


def _refuse_unknown_targets(unet: nn.Module, targets: Sequence[str]) -> None:
    sites = [name for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    unknown = [target for target in targets if not any(f".{site}".endswith(f".{target}") for site in sites)]
    # A small UNet need not have every kind of module that the usual targets name.
    if set(unknown) - set(LCM_TARGETS) or len(unknown) == len(targets):
        raise ConfigError(
            f"targets {unknown} are no Linear or Conv2d of the UNet; it has, for example, {sites[:3]}. "
            f"Usual targets: {', '.join(LCM_TARGETS)}"
        )
