"""A UNet with a PEFT adapter in it: what is trained, what a batch costs, and the adapter that comes of it."""

# Shapes: B pictures of a batch; latents are [B, 4, h, w].

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manylora.diffusion import add_noise
from manylora.lora.adapter import Adapter, LoraPair
from manylora.models.diffusion_base import DiffusionBase, run_unet
from manylora.train.image_config import TARGETS, ImageTrainConfig
from manylora.train.image_encoded import NO_CAPTION, EncodedPictures
from manylora.train.image_loss import Draw, draw, even_draw, generator_for, min_snr_weights, picture_losses

if TYPE_CHECKING:
    from accelerate import Accelerator

_EVAL_ROWS = 32  # pictures of one forward pass without gradients
_EVAL_DRAWS = 4  # noises that each held-out picture is judged with


class ImageStudent:
    """A diffusion model whose adapter is trained.

    Args:
        base: PEFT puts its layers into the UNet, in place.
    """

    def __init__(self, base: DiffusionBase, config: ImageTrainConfig, accelerator: "Accelerator") -> None:
        from peft import LoraConfig

        self.base, self.config, self.accelerator = base, config, accelerator
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.resolved_alpha,
            target_modules=list(TARGETS[config.targets]),
            use_rslora=config.rslora,
            lora_dropout=config.dropout,
        )
        torch.manual_seed(config.seed)
        base.unet.add_adapter(lora)
        if config.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        base.unet.train()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.base.unet.named_parameters() if p.requires_grad}

    def losses(self, data: EncodedPictures, rows: Sequence[int], chance: Draw) -> Tensor:  # [B]
        """Return the mean squared error of each picture."""
        base, device = self.base, self.accelerator.device
        latents, noise = data.latents_of(rows).to(device), chance.noise.to(device)
        timesteps = chance.timesteps.to(device)
        level = base.schedule.level(timesteps, latents)
        caption_rows = torch.from_numpy(data.caption_rows[list(rows)])
        caption_rows = caption_rows.masked_fill(chance.is_dropped, NO_CAPTION)
        condition = data.conditions_of(caption_rows.tolist()).to(device)
        with self.accelerator.autocast():
            output = run_unet(base.unet, add_noise(latents, noise, level), timesteps, condition)
        return picture_losses(output, latents, noise, level, base.prediction)

    def weights(self, timesteps: Tensor) -> Tensor:  # [B]
        """Return what each picture counts in training."""
        like = torch.ones(len(timesteps), 1)
        if self.config.min_snr_gamma == 0:
            return like[:, 0]
        level = self.base.schedule.level(timesteps, like)
        return min_snr_weights(level, self.base.prediction, self.config.min_snr_gamma)

    @torch.no_grad()
    def held_out_loss(self, data: EncodedPictures, rows: Sequence[int]) -> float:
        """Return the mean squared error over pictures, without weights; the same noise at every call."""
        total = 0.0
        with self.not_in_training():
            for start in range(0, len(rows), _EVAL_ROWS):
                part = rows[start : start + _EVAL_ROWS]
                latents = data.latents_of(part)
                for turn in range(_EVAL_DRAWS):
                    generator = generator_for(self.config.seed, "held out", start, turn)
                    chance = even_draw(latents, self.base.schedule, turn / _EVAL_DRAWS, generator)
                    total += self.losses(data, part, chance).sum().item()
        return total / (len(rows) * _EVAL_DRAWS)

    @contextmanager
    def not_in_training(self) -> Iterator[None]:
        """Within, there is no dropout."""
        self.base.unet.eval()
        try:
            yield
        finally:
            self.base.unet.train()

    def adapter(self, dtype: torch.dtype) -> Adapter:
        """Return a copy of the adapter as it stands."""
        from peft.tuners.lora import LoraLayer

        pairs = {
            site: _pair(layer, dtype)
            for site, layer in self.base.unet.named_modules()
            if isinstance(layer, LoraLayer)
        }
        return Adapter(pairs, self.config.out.name, self.config.base_name or self.config.model)


def step_losses(
    student: ImageStudent, data: EncodedPictures, plan: Callable[[int], list[list[int]]]
) -> Callable[[int], Iterator[Tensor]]:
    """Return, for a training loop, the losses of a step's micro-batches; they add up to the mean over its pictures.

    Args:
        plan: the step's micro-batches as rows of the data.
    """
    config = student.config

    def losses(step: int) -> Iterator[Tensor]:
        batches = plan(step)
        num_pictures = sum(map(len, batches))
        for index, rows in enumerate(batches):
            generator = generator_for(config.seed, "step", step, index)
            chance = draw(data.latents_of(rows), student.base.schedule, config.caption_dropout, generator)
            weights = student.weights(chance.timesteps).to(student.accelerator.device)
            yield (weights * student.losses(data, rows, chance)).sum() / num_pictures

    return losses


def _pair(layer: Any, dtype: torch.dtype) -> LoraPair:
    a, b = (getattr(layer, half)["default"].weight.detach() for half in ("lora_A", "lora_B"))
    kernel = (a.shape[2], a.shape[3]) if a.dim() == 4 else None
    a, b = (half.flatten(1).to("cpu", dtype, copy=True) for half in (a, b))
    return LoraPair(a, b, float(layer.scaling["default"]), kernel)
