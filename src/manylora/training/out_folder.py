"""What `out` may be: a folder that the result of a run can take the place of, and that holds nothing else."""

from collections.abc import Sequence
from pathlib import Path

from manylora.errors import ConfigError


def refuse_to_replace(out: Path, what: str, marks: Sequence[str]) -> None:
    """Raise ConfigError if `out` cannot be replaced, or holds what no run left: writing would delete it.

    To be asked before anything is trained.

    Args:
        what: what runs leave there, for the message.
        marks: files of which each such folder has one at least. An empty folder may be replaced too.
    """
    # The run's folder is called by the last part of `out`.
    if out.name in ("", ".."):
        raise ConfigError(
            f"out = {out} has no name of its own; name a folder inside it, for example {out / 'lora'}"
        )
    # A bind mount within one file system is not seen here. Its renaming fails at the end and loses nothing.
    if out.resolve().is_mount():
        raise ConfigError(
            f"out = {out} is a mount point, which cannot be replaced; name a folder inside it, for example "
            f"{out / 'lora'}"
        )
    if out.exists() and not (out.is_dir() and (_holds_any(out, marks) or not any(out.iterdir()))):
        raise ConfigError(
            f"out = {out} exists and is no {what}; it would be replaced. Choose another folder"
        )


def _holds_any(folder: Path, files: Sequence[str]) -> bool:
    return any((folder / file).exists() for file in files)
