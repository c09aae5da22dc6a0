"""Distillation of few-step sampling: the objectives, the average of the weights that learn, and the run on a model.

The run (`distill`) needs diffusers and PEFT and is imported when it is first used; the objectives need torch alone.
"""

from typing import TYPE_CHECKING, Any

from manylora.distill.config import DistillConfig
from manylora.distill.ema import EmaWeights
from manylora.distill.objective import (
    ConsistencyObjective,
    Draw,
    Objective,
    ObjectiveConfig,
    Student,
    Teacher,
)
from manylora.distill.phased import PhasedConfig, PhasedObjective

if TYPE_CHECKING:
    from manylora.distill.trainer import DistillReport, distill, load_base

__all__ = [
    "Objective",
    "ObjectiveConfig",
    "ConsistencyObjective",
    "PhasedConfig",
    "PhasedObjective",
    "Draw",
    "Student",
    "Teacher",
    "EmaWeights",
    "DistillConfig",
    "DistillReport",
    "distill",
    "load_base",
]


def __getattr__(name: str) -> Any:
    if name in ("DistillReport", "distill", "load_base"):
        from manylora.distill import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'manylora.distill' has no attribute '{name}'")
