"""What a distillation holds in memory besides activations, counted from the tensors that it makes.

Of a learner on the meta device it counts what would not fit here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import Tensor

from manylora.distill.learners import Learner


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes by what they are for. Activations come on top: they grow with batch and picture, not with what learns."""

    parameters: int
    """Student and teacher. A LoRA's teacher is its own base, all weights at once have a frozen copy beside them."""
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    ema: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in asdict(self).items())
        return f"{self.total / 1e9:.2f} GB without activations ({parts})"


def training_bytes(learner: Learner, ema: bool) -> TrainingBytes:
    """Count what a run of the learner will hold; needs no step, and no memory where its tensors are on `meta`."""
    with learner.teacher() as teacher:
        weights = [*learner.unet.parameters(), *teacher.parameters()]
    learns = _num_bytes(learner.parameters.values())
    return TrainingBytes(
        parameters=_num_bytes(weights), gradients=learns, optimizer=2 * learns, ema=learns if ema else 0
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors: student and teacher may share them."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
