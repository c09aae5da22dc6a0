"""The download cache: folders that are complete or absent. Knows no URL and no adapter."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

from manylora.errors import ConfigError

_PARTIAL = ".partial-"
_REMOVED = ".removed-"


class DownloadCache:
    """Folders by key below one folder, shared by the processes of a machine."""

    IN_USE_S = 60.0
    """A folder asked for this recently is not removed: whoever asked may be about to open its files."""

    ABANDONED_S = 86_400.0
    """A partial folder this old belongs to a process that was killed."""

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        """Beyond this, the folders that were asked for longest ago are removed. None: nothing is."""

        try:
            # Not for others to write: they could put their weights under the key of an adapter of ours.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"cache_dir '{folder}' cannot be written: {error.strerror}") from None
        self._remove_abandoned()

    def get(self, key: str, download: Callable[[Path], None], files: Sequence[str] = ()) -> Path:
        """Return the folder of `key`; if there is none that holds all of `files`, `download` fills one.

        Two processes may download the same key at once: one of the copies stays. When `download` raises,
        nothing stays, and the error goes on.
        """
        target = self.folder / key
        if self._touch(target, files):
            return target
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
        try:
            download(partial)
            for file in partial.iterdir():
                _flush(file)
            try:
                partial.rename(target)
            except OSError:
                # Another process was first: a folder is never renamed onto one that holds files.
                if not self._touch(target, files):
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._remove_oldest()
        return target

    def _touch(self, target: Path, files: Sequence[str]) -> bool:
        """Note the use of a folder that is there and whole. One that lost a file, say to a cleaner of /tmp, goes."""
        try:
            os.utime(target)
        except FileNotFoundError:
            return False
        is_whole = all((target / file).exists() for file in files)
        if not is_whole:
            self._remove(target)
        return is_whole

    def _remove_oldest(self) -> None:
        if self.max_bytes is None:
            return
        folders = [entry for entry in self.folder.iterdir() if not entry.name.startswith(".")]
        size = {folder: sum(map(_num_bytes, _files(folder))) for folder in folders}
        age = {folder: _age_s(folder) for folder in folders}
        excess = sum(size.values()) - self.max_bytes
        for folder in sorted(folders, key=age.__getitem__, reverse=True):
            if excess <= 0 or age[folder] < self.IN_USE_S:
                return
            self._remove(folder)
            excess -= size[folder]

    def _remove(self, folder: Path) -> None:
        aside = self.folder / f"{_REMOVED}{uuid4().hex}"
        try:
            folder.rename(aside)  # first out of sight as a whole: files go one by one
        except OSError:  # another process removes it
            return
        shutil.rmtree(aside, ignore_errors=True)

    def _remove_abandoned(self) -> None:
        for folder in self.folder.iterdir():
            if folder.name.startswith((_PARTIAL, _REMOVED)) and _age_s(folder) > self.ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:  # another process removed it
        return []


def _num_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _flush(file: Path) -> None:
    # Before the folder gets its name: a power cut must not leave the name without the data.
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
