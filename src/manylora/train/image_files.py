"""Captioned pictures as they lie on disk: an image folder or a WebDataset. Reads bytes and captions; decodes nothing.

An image folder has a metadata.jsonl with {"file_name": ..., "text": ...} a line, other keys ignored, as Hugging Face's
datasets read it. A WebDataset is a tar file, or a folder of them, in which members that share a name up to the first
dot are one sample: a picture (png, jpg, jpeg, webp, bmp) and a caption (txt, or the `text` or `caption` of a json).
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from manylora.errors import DataError
from manylora.json_lines import json_lines

METADATA = "metadata.jsonl"
PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp")
CAPTION_KEYS = ("text", "caption")


@dataclass(frozen=True)
class PictureFile:
    """One picture, not decoded."""

    name: str
    """As messages call it: the file, or archive and member."""
    caption: str
    """Without space around it; empty where the data set gives none."""
    data: bytes | None
    """None: the data set names it, but it cannot be read."""


def read_picture_files(path: Path) -> Iterator[PictureFile]:
    """Yield the pictures of a data set in its order, one in memory at a time.

    Raises:
        DataError: there is no data set, or a line or archive that cannot be read; with file and line.
    """
    archives = _archives(path)
    if archives:
        for archive in archives:
            yield from _read_archive(archive)
    elif (path / METADATA).is_file():
        yield from _read_folder(path)
    else:
        raise DataError(
            f"{path} is no image data set: expected a folder with {METADATA}, a .tar file, or a folder of them"
        )


def _archives(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".tar":
        return [path]
    if path.is_dir() and not (path / METADATA).is_file():
        return sorted(path.glob("*.tar"))
    return []


def _read_folder(folder: Path) -> Iterator[PictureFile]:
    for where, row in json_lines(folder / METADATA):
        name, caption = _checked_row(row, where)
        yield PictureFile(name, caption, _bytes_or_none(folder / name))


def _checked_row(row: dict[str, Any], where: str) -> tuple[str, str]:
    name, caption = row.get("file_name"), row.get("text")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: 'file_name' must be the name of a file, got {name!r}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: 'file_name' must lie in the folder, got {name!r}")
    return name, _checked_caption(caption, "text", where)


def _checked_caption(caption: Any, key: str, where: str) -> str:
    if caption is not None and not isinstance(caption, str):
        raise DataError(f"{where}: {key!r} must be a text, got {caption!r}")
    return (caption or "").strip()


def _bytes_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _read_archive(archive: Path) -> Iterator[PictureFile]:
    try:
        with tarfile.open(archive) as tar:
            # Members of a sample stand next to each other: that is what makes a WebDataset readable as a stream.
            members = (member for member in tar if member.isfile())
            for key, sample in groupby(members, lambda member: _key_and_suffix(member.name)[0]):
                parts = {_key_and_suffix(member.name)[1]: _member(tar, member) for member in sample}
                yield from _sample(f"{archive}: {key}", parts)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"archive {archive} cannot be read: {error}") from error


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, _, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # only regular files come here
    return file.read()


def _sample(where: str, parts: dict[str, bytes]) -> Iterator[PictureFile]:
    """The picture of a sample; samples of something else are none."""
    suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in parts), None)
    if suffix is not None:
        yield PictureFile(f"{where}.{suffix}", _sample_caption(where, parts), parts[suffix])


def _sample_caption(where: str, parts: dict[str, bytes]) -> str:
    try:
        if "txt" in parts:
            return parts["txt"].decode("utf-8").strip()
        told = json.loads(parts.get("json", b"{}"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{where}: the caption cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(told).__name__}")
    key = next((key for key in CAPTION_KEYS if key in told), CAPTION_KEYS[0])
    return _checked_caption(told.get(key), key, where)
