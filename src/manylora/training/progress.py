"""A progress bar for a run: steps done, loss, time left. Draws on a terminal and keeps quiet in a log file."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from manylora.training.loop import StepRecord


def with_progress(
    records: Iterable[StepRecord], *, title: str, done: int, num_steps: int, console: Console
) -> Iterator[StepRecord]:
    """Yield the records unchanged while the bar follows them.

    Args:
        done: steps that an earlier part of the run has done already.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(title, total=num_steps, completed=done, loss="-")
        for record in records:
            progress.update(bar, completed=record.step, loss=f"{record.loss:.3f}")
            yield record
