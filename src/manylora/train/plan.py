"""What the fine-tunings of texts and of pictures plan alike: how many steps there are, and how the loop takes them."""

import math
from typing import Protocol

from manylora.training.loop import LoopConfig


class PlannedConfig(Protocol):
    """The settings that a plan follows from; their meaning is in TextTrainConfig and ImageTrainConfig."""

    @property
    def epochs(self) -> float: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def batch_rows(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def checkpoint_every(self) -> int: ...


def steps_per_epoch(config: PlannedConfig, num_rows: int) -> int:
    """Optimizer steps that see every row once."""
    return math.ceil(math.ceil(num_rows / config.batch_rows) / config.accumulate)


def num_steps(config: PlannedConfig, num_rows: int) -> int:
    """Optimizer steps of the whole run. `max_steps` goes before `epochs`, as in transformers."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, round(steps_per_epoch(config, num_rows) * config.epochs))


def loop_config(config: PlannedConfig, num_steps: int) -> LoopConfig:
    """Return the loop's settings for a run of so many steps."""
    return LoopConfig(
        num_steps=num_steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(num_steps - 1, round(num_steps * config.warmup_fraction)),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        checkpoint_every=config.checkpoint_every,
    )
