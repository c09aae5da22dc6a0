"""The same figures as in metrics.jsonl for TensorBoard, where it is installed; where it is not, nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """Args:
    step: where the run stands; what an earlier part of it showed beyond that is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = _writer(folder, step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
