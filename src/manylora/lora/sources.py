"""Where adapters come from: what every root answers, and the root that is a folder. Reads no weights.

An adapter is a folder that PEFT or diffusers saved, or one .safetensors file, whose name has no suffix here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from manylora.errors import AdapterFormatError, AdapterNotFoundError, AdapterUnavailableError, ConfigError
from manylora.lora.convert import DIFFUSERS_FILE
from manylora.lora.formats import CONFIG_FILE, TENSOR_FILE
from manylora.lora.names import name_problem, quoted

SUFFIX = ".safetensors"

MARKS = (CONFIG_FILE, DIFFUSERS_FILE)
"""A folder that holds one of these files is one adapter."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a root holds under a name at one moment."""

    location: str
    """The folder or file with all links resolved, or the URL (without credentials)."""

    version: str
    """Changes when either file is replaced or rewritten: equal versions of a location, equal content."""

    num_bytes: int
    """Size of the weights file."""


class Source(Protocol):
    """A root: names below it, found and opened."""

    label: str
    """The root as messages show it."""

    url_prefix: str
    """What the URL of an adapter begins with, up to its name; empty for a local folder."""

    @property
    def kind(self) -> Literal["folder", "remote"]: ...

    @property
    def folder(self) -> str:
        """The local folder below which its files are opened, absolute."""

    def names(self) -> list[str]:
        """List all adapters below the root, in any order. Opens no file."""

    def find(self, name: str) -> Found | None:
        """Return what `name` is now, None if the root holds no such name. `name` has passed `check_name`.

        Raises:
            AdapterNotFoundError: it leads out of the root.
            AdapterFormatError: it is there, and is no adapter that can be read.
            AdapterUnavailableError: the root cannot be asked, or a file not be looked at.
        """

    def name_of(self, location: str) -> str | None:
        """Return the name of an absolute path or URL below the root, None if it does not lie below."""

    def open(self, name: str, found: Found) -> AbstractContextManager[Path]:
        """Give the local folder or file of that very version, for reading inside the `with`.

        `name` is for messages; what is opened is what `found` says.

        Raises:
            AdapterNotFoundError: that version is gone.
            AdapterFormatError: a file is not what it should be.
            AdapterUnavailableError: it cannot be fetched or stored.
        """


class LocalSource:
    """A local folder.

    A folder below it is an adapter if it holds adapter_config.json or pytorch_lora_weights.safetensors, and so is each
    .safetensors file that lies in no such folder. Of a folder and a file of one name, the folder counts.
    """

    kind: Literal["folder"] = "folder"
    url_prefix = ""

    def __init__(self, root: str | Path) -> None:
        if not os.fspath(root) or not os.path.isdir(root):
            raise ConfigError(f"adapter root {os.fspath(root)!r} is not a folder")
        self.label = os.fspath(root)
        self._root = os.path.abspath(root)

    @property
    def folder(self) -> str:
        return self._root

    def names(self) -> list[str]:
        """List all adapters below the root. A linked folder is listed itself; what lies below it is not.

        Only folders are read: 10,000 adapters take a fraction of a second.
        """
        found: list[str] = []
        pending = [""]
        while pending:
            below = pending.pop()
            try:
                found += self._names_in(below, pending)
            except OSError:  # removed since its parent was read, or not readable, which find() reports
                continue
        return found

    def _names_in(self, below: str, pending: list[str]) -> list[str]:
        """List the adapters in one folder; the folders in it are added to `pending`."""
        files: list[str] = []
        linked: list[str] = []
        is_adapter = False
        with os.scandir(os.path.join(self._root, below)) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                is_adapter = is_adapter or (entry.name in MARKS and below != "")
                if name_problem(name):
                    continue
                if entry.name.endswith(SUFFIX) and _is_file(entry) and entry.name != TENSOR_FILE:
                    files.append(name.removesuffix(SUFFIX))
                elif entry.is_file(follow_symlinks=False):
                    continue
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                # Not followed further: links may form a loop.
                elif entry.is_symlink() and self._is_linked_adapter(entry.path):
                    linked.append(name)
        # What else lies in an adapter's folder is part of it.
        return linked + ([below] if is_adapter else files)

    def find(self, name: str) -> Found | None:
        try:
            path = self._path_of(name)
            real = None if path is None else _without_links(path)
        except PermissionError:
            raise AdapterNotFoundError(
                f"adapter {quoted(name)} cannot be read: permission denied"
            ) from None
        except OSError:  # removed meanwhile
            return None
        if real is None:
            return None
        if not self._holds(real):
            raise AdapterNotFoundError(
                f"adapter {quoted(name)} is a link out of its root; it is not followed"
            )
        return self._found(name, real)

    def name_of(self, location: str) -> str | None:
        if not os.path.isabs(location) or "\0" in location:  # the latter no path can hold
            return None
        real = _without_links(location, strict=False)
        if not self._holds(real):
            return None
        path = os.path.relpath(real, os.path.realpath(self._root))
        if os.path.isdir(real):
            return path
        folder, file = os.path.split(path)
        return folder if folder and file == DIFFUSERS_FILE else path.removesuffix(SUFFIX)

    def _path_of(self, name: str) -> str | None:
        """The folder or file that `name` names, None if there is none.

        Raises:
            PermissionError: a folder on the way may not be entered.
        """
        folder = os.path.join(self._root, name)
        if _is_there(folder, CONFIG_FILE):
            return folder
        if _is_there(folder, DIFFUSERS_FILE):
            return os.path.join(folder, DIFFUSERS_FILE)
        parent, last = os.path.split(folder)
        is_part = parent != self._root and any(_is_there(parent, mark) for mark in MARKS)
        if is_part or last + SUFFIX == TENSOR_FILE or not _is_there(parent, last + SUFFIX):
            return None
        return folder + SUFFIX

    @contextmanager
    def open(self, name: str, found: Found) -> Iterator[Path]:
        self._check_unchanged(name, found)
        try:
            yield Path(found.location)
        finally:
            # Files replaced while they were read may have been read half old, half new.
            self._check_unchanged(name, found)

    def _check_unchanged(self, name: str, found: Found) -> None:
        try:
            # Links may have been laid since: resolve again, so that nothing outside of the root is read.
            real = _without_links(found.location)
            now = self._found(name, real) if self._holds(real) else None
        except OSError:
            now = None
        if now != found:
            raise AdapterNotFoundError(replaced_since(name))

    def _found(self, name: str, location: str) -> Found:
        folder, files = location, [CONFIG_FILE, TENSOR_FILE]
        if not os.path.isdir(location):
            folder, file = os.path.split(location)
            files = [file]
        stats = [self._file_stat(name, folder, file) for file in files]
        # The change time moves with every write and cannot be set back, as the modification time can. The
        # inode tells two files apart that were renamed into place within one tick of the disk's clock.
        version = "-".join(f"{s.st_ino:x}.{s.st_ctime_ns:x}.{s.st_size:x}" for s in stats)
        return Found(location=location, version=version, num_bytes=stats[-1].st_size)

    def _file_stat(self, name: str, folder: str, file: str) -> os.stat_result:
        path = os.path.join(folder, file)
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not self._holds(os.path.realpath(path)):
                    raise AdapterFormatError(f"adapter {quoted(name)}: {file} is a link out of its root")
                status = os.stat(path)
        except FileNotFoundError:
            raise AdapterFormatError(missing_file(name, file)) from None
        except OSError as error:  # a loop of links; a folder that may not be entered; a disk that fails
            raise AdapterUnavailableError(
                f"adapter {quoted(name)}: {file} cannot be read: {error.strerror}"
            ) from None
        # Opening a named pipe would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise AdapterFormatError(f"adapter {quoted(name)}: {file} is not a regular file")
        return status

    def _is_linked_adapter(self, folder: str) -> bool:
        is_adapter = any(os.path.exists(os.path.join(folder, mark)) for mark in MARKS)
        return is_adapter and self._holds(os.path.realpath(folder))

    def _holds(self, real: str) -> bool:
        """Whether a path without links lies below the root, which may be a link and be laid anew."""
        return real.startswith(os.path.join(os.path.realpath(self._root), ""))


def _without_links(path: str, *, strict: bool = True) -> str:
    """The path with the links to its folder resolved. The file at its end keeps its name, even if it is a link."""
    if os.path.isdir(path):
        return os.path.realpath(path, strict=strict)
    folder, file = os.path.split(path)
    return os.path.join(os.path.realpath(folder, strict=strict), file)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself, through a file, or into a folder that may not be entered
        return False


def _is_there(folder: str, file: str) -> bool:
    try:
        os.stat(os.path.join(folder, file))
    except PermissionError:
        raise
    except OSError:  # absent; a file in place of a folder; a loop of links; a name too long for the disk
        return False
    return True


def missing_file(name: str, file: str) -> str:
    return (
        f"adapter {quoted(name)} has no {file}; expected {CONFIG_FILE} and {TENSOR_FILE} "
        "(pickled weights, adapter_model.bin, are never read: convert them)"
    )


def replaced_since(name: str) -> str:
    return f"adapter {quoted(name)} was replaced or removed after it was located; locate it again"
