"""Latents and text conditions of a data set: computed once, kept on disk, mapped into memory. Knows no adapter.

    about.json         what was encoded by what, the captions, what was left out; written last
    latents.f16        [N, 4, h, w] of the pictures
    embeddings.f16     [K, L, C] of the distinct captions; SDXL: pooled.f16 [K, P] and time_ids.f16 [K, 6] too

In half precision: its error is below a thousandth of the spread, far below the noise that training adds.
"""

# Shapes: N pictures, K captions, B rows of a batch.

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from manylora.errors import DataError, TrainingError
from manylora.models.diffusion_base import Condition, DiffusionBase
from manylora.models.fingerprint import encoders_hash
from manylora.train.image_files import PictureFile, read_picture_files
from manylora.train.image_pixels import decode
from manylora.training.aside import directory_aside

NO_CAPTION = 0
"""The row of the conditions that is no prompt at all."""

T = TypeVar("T")

_PICTURES_A_PASS = 8
_CAPTIONS_A_PASS = 64
_ABOUT = "about.json"


@dataclass(frozen=True)
class EncodedPictures:
    """A data set as training sees it."""

    latents: NDArray[np.float16]  # [N, 4, h, w]
    conditions: Mapping[str, NDArray[np.float16]]  # by field of Condition, each [K, ...]
    captions: Sequence[str]
    """The K distinct captions; the first is the empty one."""
    caption_rows: NDArray[np.int64]  # [N], in [0, K)
    digests: Sequence[str]
    """Of each picture's bytes."""
    left_out: Mapping[str, str]
    """Why, by name of the picture."""
    content_hash: str
    """Of all captions and bytes, in order."""
    num_cut: int
    """Captions longer than the text encoder takes, whose ends it does not see."""

    def __len__(self) -> int:
        return len(self.latents)

    def latents_of(self, rows: Sequence[int]) -> Tensor:  # [B, 4, h, w] fp32
        return torch.from_numpy(self.latents[list(rows)]).float()

    def conditions_of(self, caption_rows: Sequence[int]) -> Condition:
        """Return the conditions of captions, fp32."""
        return Condition(
            **{
                name: torch.from_numpy(table[list(caption_rows)]).float()
                for name, table in self.conditions.items()
            }
        )


def encode_pictures(
    path: Path, base: DiffusionBase, size: int, skip_empty: bool, folder: Path, console: Console
) -> EncodedPictures:
    """Return a data set encoded by a base; taken from `folder` where the same was encoded there before.

    Raises:
        DataError: no data set, or none of its pictures can be used.
        TrainingError: what was encoded cannot be written, for example because the disk is full.
    """
    content_hash, num_files = _content_hash(path)
    made_of = {
        "content_hash": content_hash,
        "encoders": encoders_hash(base),
        "size": size,
        "skip_empty": skip_empty,
    }
    if _made_of(folder) != made_of:
        files = track(
            read_picture_files(path),
            f"encoding {path.name}",
            total=num_files,
            console=console,
            transient=True,
        )
        try:
            with directory_aside(folder) as aside:
                _write(aside, files, base, size, skip_empty, made_of)
        except OSError as error:
            raise TrainingError(f"latents cannot be written to {folder}: {error}") from error
    encoded = _read(folder)
    if not len(encoded):
        raise DataError(
            f"{path}: none of its {num_files} pictures can be used"
            + "".join(f"\n  {name}: {reason}" for name, reason in list(encoded.left_out.items())[:3])
        )
    return encoded


def split_by_content(digests: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return rows (for training, held out), so that equal pictures never stand on both sides."""
    # By a hash of each alone: a picture that is added later moves no other to the other side.
    ranked = sorted(set(digests), key=lambda digest: blake2b(f"{seed}/{digest}".encode()).digest())
    num_held_out = max(1, round(len(ranked) * fraction))
    if num_held_out >= len(ranked):
        raise DataError(
            f"{len(ranked)} different pictures are too few to hold {fraction:.0%} of them out; give eval_data instead"
        )
    held_out = set(ranked[:num_held_out])
    return (
        [row for row, digest in enumerate(digests) if digest not in held_out],
        [row for row, digest in enumerate(digests) if digest in held_out],
    )


def _content_hash(path: Path) -> tuple[str, int]:
    """Hash of captions and bytes in order, and how many pictures are named; where they lie does not count."""
    digest, count = blake2b(digest_size=16), 0
    for file in read_picture_files(path):
        count += 1
        for part in (file.caption.encode(), file.data or b"missing"):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest(), count


def _made_of(folder: Path) -> Any:
    about = folder / _ABOUT
    return json.loads(about.read_text(encoding="utf-8"))["made_of"] if about.is_file() else None


def _write(
    folder: Path,
    files: Iterable[PictureFile],
    base: DiffusionBase,
    size: int,
    skip_empty: bool,
    made_of: Mapping[str, Any],
) -> None:
    captions: dict[str, int] = {"": NO_CAPTION}
    caption_rows: list[int] = []
    digests: list[str] = []
    left_out: dict[str, str] = {}

    def usable() -> Iterator[Tensor]:
        for file in files:
            try:
                if skip_empty and not file.caption:
                    raise DataError("it has no caption")
                pixels = decode(file.data, size)
            except DataError as error:
                left_out[file.name] = str(error)
                continue
            caption_rows.append(captions.setdefault(file.caption, len(captions)))
            digests.append(blake2b(file.data or b"", digest_size=16).hexdigest())
            yield pixels

    # The mean of the encoder's distribution, whose spread is far below the noise that training adds.
    latents = (
        {"latents": base.encode_images(torch.stack(part))} for part in _batched(usable(), _PICTURES_A_PASS)
    )
    shapes = _append(folder, latents) or {"latents": [0, *base.latent_shape(size, size)]}
    shapes |= _append(folder, _conditions(base, list(captions), size))
    about = {
        "made_of": made_of,
        "shapes": shapes,
        "captions": list(captions),
        "caption_rows": caption_rows,
        "digests": digests,
        "left_out": left_out,
        "num_cut": sum(bool(base.cut_off(caption)) for caption in captions),
    }
    (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def _conditions(base: DiffusionBase, captions: Sequence[str], size: int) -> Iterator[dict[str, Tensor]]:
    # Sampling compares with the base's own "no prompt", which for SDXL is not the empty text; so training does too.
    yield _tensors(base.unconditional(height=size, width=size))
    for part in _batched(captions[1:], _CAPTIONS_A_PASS):
        yield _tensors(base.encode_prompts(part, height=size, width=size))


def _tensors(condition: Condition) -> dict[str, Tensor]:
    named = {field.name: getattr(condition, field.name) for field in fields(condition)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _append(folder: Path, parts: Iterator[dict[str, Tensor]]) -> dict[str, list[int]]:
    """Write tensors of each name one after another; returns the shape of each as a whole.

    Through a file, not a map: on a full disk a write raises an error, a map kills the process.
    """
    shapes: dict[str, list[int]] = {}
    for part in parts:
        for name, tensor in part.items():
            with _table(folder, name).open("ab") as file:
                file.write(tensor.half().contiguous().numpy(force=True).tobytes())
            shape = shapes.setdefault(name, [0, *tensor.shape[1:]])
            shape[0] += len(tensor)
    return shapes


def _read(folder: Path) -> EncodedPictures:
    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    tables = {name: _mapped(folder, name, shape) for name, shape in about["shapes"].items()}
    return EncodedPictures(
        latents=tables.pop("latents"),
        conditions=tables,
        captions=about["captions"],
        caption_rows=np.asarray(about["caption_rows"], dtype=np.int64),
        digests=about["digests"],
        left_out=about["left_out"],
        content_hash=about["made_of"]["content_hash"],
        num_cut=about["num_cut"],
    )


def _mapped(folder: Path, name: str, shape: Sequence[int]) -> NDArray[np.float16]:
    if shape[0] == 0:  # an empty file cannot be mapped
        return np.empty(shape, dtype=np.float16)
    return np.memmap(_table(folder, name), dtype=np.float16, mode="r", shape=tuple(shape))


def _table(folder: Path, name: str) -> Path:
    return folder / f"{name}.f16"


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last of what is left."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch
