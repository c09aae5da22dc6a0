"""Which pictures are asked for, and which real ones they are compared with: both from a held-out image folder."""

# Shapes: N pictures asked for: every prompt with every seed.

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from manylora.errors import DataError
from manylora.json_lines import json_lines

Rows = Sequence[Mapping[str, Any]]
"""Of a metadata.jsonl: `file_name`, `text`, `subjects` (the names on the picture), `kind`."""


@dataclass(frozen=True)
class PromptSet:
    """The pictures asked for, one entry each."""

    captions: tuple[str, ...]
    subjects: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    prompts: tuple[int, ...]
    """Which prompt each picture is of; pictures of one prompt differ in their seed."""
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def content_hash(self) -> str:
        columns = [self.captions, self.subjects, self.prompts, self.seeds]
        return hashlib.sha256(json.dumps(columns).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Pictures of each kind."""
        return dict(Counter(self.kinds))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of an image folder whose captions say what is on each picture; blank lines are skipped.

    Raises:
        DataError: there are none, or a row is malformed or lacks what a judge needs; with file and line.
    """
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise DataError(f"no {path}: expected an image folder of held-out pictures")
    return [_checked_row(row, where) for where, row in json_lines(path)]


def _checked_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    missing = {"file_name", "text", "subjects"} - row.keys()
    if missing:
        raise DataError(f"{where}: lacks {', '.join(sorted(missing))}; judged pictures need them")
    return {"kind": "picture", **row}


def choose_prompts(rows: Rows, num_prompts: int, num_seeds: int, seed: int = 0) -> PromptSet:
    """Return `num_prompts` distinct captions, with `num_seeds` pictures of each.

    Kinds share the prompts as they share the rows; what a kind lacks in distinct captions, the others give.

    Raises:
        DataError: the rows have fewer distinct captions.
    """
    by_kind: dict[str, dict[str, tuple[str, ...]]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], {}).setdefault(row["text"], tuple(row["subjects"]))
    if sum(map(len, by_kind.values())) < num_prompts:
        raise DataError(
            f"asked for {num_prompts} prompts, but there are {sum(map(len, by_kind.values()))} distinct captions"
        )
    num_rows = Counter(row["kind"] for row in rows)
    taken = dict.fromkeys(by_kind, 0)
    for _ in range(num_prompts):
        open_kinds = [kind for kind in by_kind if taken[kind] < len(by_kind[kind])]
        most_due = min(open_kinds, key=lambda kind: (taken[kind] + 1) / num_rows[kind])
        taken[most_due] += 1
    chosen = [
        (caption, subjects, kind)
        for kind, captions in by_kind.items()
        for caption, subjects in list(captions.items())[: taken[kind]]
    ]
    numbers = [(prompt, prompt * num_seeds + s) for prompt in range(num_prompts) for s in range(num_seeds)]
    return PromptSet(
        captions=tuple(chosen[prompt][0] for prompt, _ in numbers),
        subjects=tuple(chosen[prompt][1] for prompt, _ in numbers),
        kinds=tuple(chosen[prompt][2] for prompt, _ in numbers),
        prompts=tuple(prompt for prompt, _ in numbers),
        seeds=tuple(seed * 1_000_003 + index for _, index in numbers),
    )


def alike_rows(rows: Rows, prompts: PromptSet, most: int | None = None) -> list[dict[str, Any]]:
    """Return as many rows as there are of the prompts' mix of kinds, in order.

    A set of real pictures with more of one kind would be at a distance that no model could close.

    Args:
        most: rows to return at most.
    Raises:
        DataError: the rows lack a kind that the prompts have.
    """
    shares = {kind: count / len(prompts) for kind, count in prompts.counts.items()}
    lacking = sorted(shares.keys() - {row["kind"] for row in rows})
    if lacking:
        raise DataError(f"the prompts are of the kinds {sorted(shares)}, but no picture is of {lacking}")
    of_kind = {kind: [dict(row) for row in rows if row["kind"] == kind] for kind in shares}
    total = min(len(of_kind[kind]) / share for kind, share in shares.items())
    total = total if most is None else min(total, most)
    return [row for kind, share in shares.items() for row in of_kind[kind][: round(total * share)]]


def read_pictures(folder: Path, rows: Rows, size: int) -> Tensor:
    """Return the rows' pictures [N, 3, size, size] in [-1, 1]."""
    pixels: NDArray[np.uint8] = np.empty((len(rows), size, size, 3), dtype=np.uint8)
    for index, row in enumerate(rows):
        with Image.open(folder / row["file_name"]) as image:
            rgb = image.convert("RGB")
            pixels[index] = np.asarray(
                rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.LANCZOS)
            )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
