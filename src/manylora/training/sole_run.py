"""One run at a time in a run's folder: two would cut each other's metrics and delete each other's checkpoints.

Their folders are the same where the same command is given twice, or where two `out` end in the same name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora.errors import ConfigError


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold the run's folder, which is made if need be. A killed run lets go of it.

    Raises:
        ConfigError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The file stays: who deleted it could take it away from under a run that has just opened it.
    with (folder / "lock").open("w") as file:
        _lock(file.fileno(), folder)
        yield


def _lock(descriptor: int, folder: Path) -> None:
    """Where there are no locks, do without."""
    try:
        import fcntl
    except ImportError:
        return  # a system without them
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another run uses {folder}, which is called by the last part of out. Wait until that run ends, or give "
            "this one another name"
        ) from None
    except OSError:
        pass  # a file system without them
