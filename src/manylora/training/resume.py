"""Takes a run up where it stands."""

from rich.console import Console

from manylora.training.loop import TrainingRun


def take_up(run: TrainingRun, console: Console, *, resume: bool) -> bool:
    """Go on from the newest checkpoint and say so; returns whether there was one.

    Args:
        resume: False deletes what there is of the run first.
    Raises:
        ConfigError: the run in the folder is one of other settings or data.
    """
    if not resume:
        run.forget()
    found = run.resume()
    if found:
        console.print(
            f"going on from step {run.step} of {run.config.num_steps} in {run.folder}", soft_wrap=True
        )
    return found
