"""The optimizer loop that every training run shares: steps, clipping, checkpoints, and going on after a kill.

Knows parameters, a loss and a folder. Knows no model, data or adapter format, so fine-tuning and distillation use
the same loop. It is a generator: who iterates decides what to print and when to evaluate.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manylora.errors import ConfigError, TrainingError
from manylora.training.checkpoint import Checkpoint, load_latest, rng_state, save_checkpoint, set_rng_state
from manylora.training.metrics import MetricsLog
from manylora.training.schedule import warmup_cosine

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    num_steps: int
    """Optimizer steps of the whole run."""

    learning_rate: float
    """Peak learning rate of AdamW."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""

    final_fraction: float = 0.1
    """Share of the peak learning rate at which the cosine ends."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always writes one."""

    keep_checkpoints: int = 2
    """Checkpoints kept on disk."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ConfigError(
                f"warmup_steps must lie in [0, num_steps = {self.num_steps}), got {self.warmup_steps}"
            )


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did."""

    step: int
    """Steps done so far, this one included."""
    loss: float
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    seconds: float


class TrainingRun:
    """One run in one folder: `checkpoints/`, `metrics.jsonl`.

    Args:
        parameters: what is trained, by name. Anything else that must survive a kill and is a tensor (an EMA copy)
            goes into `extra_tensors`; both are restored in place.
        fingerprint: JSON values that fix the trajectory. A continuation with another fingerprint is refused.
    """

    def __init__(
        self,
        folder: Path,
        config: LoopConfig,
        parameters: Mapping[str, nn.Parameter],
        accelerator: "Accelerator",
        fingerprint: Mapping[str, Any],
        extra_tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.folder, self.config, self.fingerprint = folder, config, dict(fingerprint)
        self.parameters, self.extra_tensors = dict(parameters), dict(extra_tensors or {})
        self.accelerator = accelerator
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,  # 4 to 7 % of a small model's step on a CPU
        )
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.step = 0
        self.notes: dict[str, Any] = {"train_seconds": 0.0}

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resume(self) -> bool:
        """Take up the newest checkpoint, if there is one; returns whether there was.

        Raises:
            ConfigError: the checkpoint belongs to a run with other settings or data; names each difference.
        """
        checkpoint = load_latest(self.checkpoints)
        if checkpoint is None:
            self.metrics.rewind(-1)
            return False
        self._refuse_other_run(checkpoint)
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(checkpoint.parameters[name])
        self.optimizer.load_state_dict(dict(checkpoint.optimizer))
        set_rng_state(checkpoint.rng)
        self.step, self.notes = checkpoint.step, dict(checkpoint.notes)
        self.metrics.rewind(self.step)
        return True

    def forget(self) -> None:
        """Delete the folder's checkpoints and metrics, to start afresh."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.metrics.path.unlink(missing_ok=True)

    def steps(self, losses: Callable[[int], Iterator[Tensor]]) -> Iterator[StepRecord]:
        """Run the steps that are left, one record each.

        Args:
            losses: given the step (from 0), yields scalar losses whose sum is the step's loss, one per micro-batch.
                Each is differentiated before the next is asked for, so only one graph is alive at a time.
        Raises:
            TrainingError: loss or gradient is not finite. The parameters still hold the step before, and the last
                checkpoint stays as it was.
        """
        while self.step < self.config.num_steps:
            record = self._train_step(losses)
            self.metrics.append(asdict(record))
            yield record
            # After the yield, so that what the reader of the record added to the notes is in the checkpoint.
            if self.step % self.config.checkpoint_every == 0 or self.step == self.config.num_steps:
                self.save()

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        return save_checkpoint(
            self.checkpoints,
            Checkpoint(
                self.step,
                self._tensors(),
                self.optimizer.state_dict(),
                rng_state(),
                self.fingerprint,
                self.notes,
            ),
            self.config.keep_checkpoints,
        )

    def _train_step(self, losses: Callable[[int], Iterator[Tensor]]) -> StepRecord:
        started = time.perf_counter()
        learning_rate = self.config.learning_rate * warmup_cosine(
            self.step, self.config.num_steps, self.config.warmup_steps, self.config.final_fraction
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for loss in losses(self.step):
            value = loss.item()
            self._refuse_not_finite("loss", value)
            self.accelerator.backward(loss)
            total += value
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm).item()
        self._refuse_not_finite("gradient norm", grad_norm)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        self.notes["train_seconds"] += seconds
        return StepRecord(self.step, total, learning_rate, grad_norm, seconds)

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.extra_tensors}

    def _refuse_not_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        kept = sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []
        last_good = (
            f"The last good checkpoint is kept: {kept[-1]}." if kept else "No checkpoint was written yet."
        )
        raise TrainingError(
            f"{what} is {value} at step {self.step + 1} of {self.config.num_steps}; stopped before the parameters "
            f"changed. {last_good} Try a lower learning rate (it was {self.config.learning_rate:g}) or fp32."
        )

    def _refuse_other_run(self, checkpoint: Checkpoint) -> None:
        stored, ours = checkpoint.fingerprint, self.fingerprint
        differences = [
            f"  {key}: checkpoint {stored.get(key)!r}, now {ours.get(key)!r}"
            for key in sorted(stored.keys() | ours.keys())
            if stored.get(key) != ours.get(key)
        ]
        if differences:
            raise ConfigError(
                f"{self.folder} holds a run with other settings, which cannot be continued with these:\n"
                + "\n".join(differences)
                + "\n  Use the old settings, another run name, or start afresh (resume=False)."
            )
