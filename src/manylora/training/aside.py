"""Write aside, then rename: a reader, or a run that comes back after a kill, never meets half a file."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def directory_aside(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends without an error.

    An older `target` is replaced whole, never merged; a link stays, and what it leads to is replaced. The folder's
    files reach the disk before the rename does.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _aside(target), target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            _flush_to_disk(path)
        shutil.rmtree(old, ignore_errors=True)
        # A folder cannot be renamed over a full one. Between the two renames the target is absent, never broken.
        if target.exists():
            target.rename(old)
        try:
            aside.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        _flush_to_disk(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text_aside(target: Path, text: str) -> None:
    """Replace the file `target` by `text` in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    aside.write_text(text, encoding="utf-8")
    _flush_to_disk(aside)
    aside.replace(target)


def _aside(target: Path) -> Path:
    # Always the same name, so that what a killed run left there is cleared by the next one.
    return target.with_name(f".{target.name}.aside")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
