"""A disk that is full or fails in the middle of a run: said as what it means, with what is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from manylora.errors import TrainingError

# torch.save says a failed write only in the text of a RuntimeError.
_TORCH_WRITES = ("PytorchStreamWriter", "iostream error")


@contextmanager
def disk_errors(run_folder: Path, out: Path) -> Iterator[None]:
    """Within, a file that cannot be written or read raises TrainingError: nothing is lost but the last few steps."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(said in str(error) for said in _TORCH_WRITES):
            raise
        kept = sorted((run_folder / "checkpoints").glob("step-*"))
        last_good = (
            f"The last good checkpoint is kept: {kept[-1]}." if kept else "No checkpoint was written yet."
        )
        raise TrainingError(
            f"a file of the run in {run_folder} or of {out} cannot be written or read: {error}. {last_good} "
            "Mend that (if the disk is full, make room) and run the same command again."
        ) from error
