"""The two files of an adapter's directory: found, read unchanged, replaced. Knows nothing of what is in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from manylora.errors import AdapterFormatError, AdapterNotFoundError, AdapterUnavailableError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"


def adapter_folder(path: str | Path) -> Path:
    """Return the directory that holds both files, given it or one of them.

    Raises:
        AdapterNotFoundError: there is no such directory.
        AdapterFormatError: a file is missing; the message says what is there instead.
    """
    given = Path(path)
    folder = given.parent if given.name in (CONFIG_FILE, TENSOR_FILE) else given
    try:
        present = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterNotFoundError(f"'{given}' is no directory of an adapter") from None
    for file in (CONFIG_FILE, TENSOR_FILE):
        if file not in present:
            raise AdapterFormatError(f"'{folder}' has no {file}; {_what_else(present)}")
    return folder


def _what_else(present: list[str]) -> str:
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code when it is opened, so it is not read. If you trust "
            "it, open it with PEFT and save it: PeftModel.from_pretrained(...).save_pretrained(directory)"
        )
    return f"it holds {present or 'nothing'}; expected {CONFIG_FILE} and {TENSOR_FILE}, as PEFT saves them"


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Say what the disk or its permissions refuse inside as an adapter that cannot be had now.

    Raises:
        AdapterUnavailableError: naming the file, or `path` where the system does not say which.
    """
    try:
        yield
    except OSError as error:
        raise AdapterUnavailableError(
            f"'{error.filename or path}' cannot be read: {error.strerror or error}"
        ) from error


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Refuse what is read inside if the files change meanwhile: a config must not be paired with other weights."""
    try:
        before = _stamp(folder)
        yield
        changed = _stamp(folder) != before
    except FileNotFoundError:
        changed = True
    if changed:
        raise AdapterFormatError(f"{folder} changed while it was read; load it again")


def _stamp(folder: Path) -> list[tuple[int, int, int]]:
    stats = [(folder / file).stat() for file in (CONFIG_FILE, TENSOR_FILE)]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def replace_files(directory: Path, *, config: bytes, tensors: bytes) -> None:
    """Write both files aside, then rename: a new directory appears whole, in an old one other files stay.

    Whoever reads meanwhile, through `unchanged`, gets the old files, the new ones or an error, never one of each;
    so does whoever reads after a crash.
    """
    folder = directory.resolve()
    aside = folder.with_name(f".{folder.name}.{uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        _write(aside / TENSOR_FILE, tensors)
        _write(aside / CONFIG_FILE, config)
        if folder.exists():
            # No config in between: weights beside the config of others would load, and be wrong.
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            os.replace(aside / TENSOR_FILE, folder / TENSOR_FILE)
            os.replace(aside / CONFIG_FILE, folder / CONFIG_FILE)
        else:
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file aside, then rename it into place: whoever reads meanwhile gets the old file or the new one."""
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        _write(aside, data)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a crash could leave the renamed directory with empty files
