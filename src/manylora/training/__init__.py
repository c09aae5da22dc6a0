"""What every training run shares: the optimizer loop, checkpoints with exact resume, metrics, progress and plots."""

from manylora.training.loop import LoopConfig, StepRecord, TrainingRun

__all__ = ["LoopConfig", "StepRecord", "TrainingRun"]
