"""Distillation of few-step sampling: the objective, and the average of the weights that learn."""

from manylora.distill.ema import EmaWeights
from manylora.distill.objective import ConsistencyObjective, Draw, ObjectiveConfig, Student, Teacher

__all__ = ["ConsistencyObjective", "ObjectiveConfig", "Draw", "Student", "Teacher", "EmaWeights"]
