"""metrics.jsonl: one line a step, and no line that a continued run would write twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manylora.training.aside import write_text_aside


class MetricsLog:
    """Append-only record of a run; each row has at least `step` (1 after the first optimizer step)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        return list(self._read()) if self.path.exists() else []

    def rewind(self, step: int) -> None:
        """Keep what was known when the checkpoint of `step` was written: everything up to that training step.

        A run that was killed past its last checkpoint does those steps again, and what was measured after step
        `step` (a held-out loss) is measured again too.
        """
        kept = [row for row in self.rows() if row["step"] < step or (row["step"] == step and "loss" in row)]
        write_text_aside(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def _read(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                # A kill can cut the last line short. Whatever it said lies beyond the last checkpoint.
                return
