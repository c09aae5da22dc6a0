"""`manylora train text`: LoRA fine-tuning of a causal language model on a JSONL file."""

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from manylora.errors import DataError
from manylora.models.fingerprint import weights_hash
from manylora.train.plan import loop_config, num_steps, steps_per_epoch
from manylora.train.text_config import TextTrainConfig
from manylora.train.text_data import Dataset, plan_batches, tokenize_rows
from manylora.train.text_model import TextStudent, load_base, step_losses
from manylora.train.text_output import CONFIG_FILE, command_line, write_adapter
from manylora.train.text_rows import Row, content_hash, read_rows, split_rows
from manylora.training.disk import disk_errors
from manylora.training.hardware import describe_environment, make_accelerator
from manylora.training.loop import TrainingRun
from manylora.training.out_folder import refuse_to_replace
from manylora.training.plot import plot_losses
from manylora.training.progress import with_progress
from manylora.training.resume import take_up
from manylora.training.sole_run import sole_run

# Settings that say where things go or how often they are kept: a continued run may change them.
_NOT_OF_THE_TRAJECTORY = {
    "data",
    "eval_data",
    "out",
    "out_dtype",
    "name",
    "runs_dir",
    "base_name",
    "checkpoint_every",
    "resume",
}


@dataclass(frozen=True)
class TrainReport:
    """What a finished run says of itself; also in training.json."""

    out: Path
    run_folder: Path
    num_steps: int
    eval_loss_before: float
    """Mean loss a target token of the held-out rows under the base alone, in nats."""
    eval_loss_after: float
    """The same with the adapter."""
    train_seconds: float
    """Time spent in steps, over all parts of an interrupted run."""


def train_text(config: TextTrainConfig, console: Console | None = None) -> TrainReport:
    """Train an adapter and write it to `config.out`; goes on where an interrupted run of the same settings stopped.

    A run that was killed ends with the same bits as one that was not, on the same machine and thread count.

    Args:
        console: for notes and the progress bar; stderr by default.
    Raises:
        ConfigError: settings that contradict each other, the model, or the run that is to be continued; an `out` that
            cannot be replaced; another run that uses the run's folder.
        DataError: rows that cannot be used, with file and line.
        ModelError: the base model cannot be loaded.
        TrainingError: loss or gradient is not finite (the last good checkpoint is kept), or the disk is full.
    """
    console = console or Console(stderr=True)
    refuse_to_replace(config.out, "adapter", (CONFIG_FILE,))
    rows, eval_rows = _rows(config)
    with disk_errors(config.run_folder, config.out), sole_run(config.run_folder):
        return _train(config, rows, eval_rows, console)


def _train(config: TextTrainConfig, rows: list[Row], eval_rows: list[Row], console: Console) -> TrainReport:
    """Load the base, run the steps that are left and write the adapter."""
    accelerator = make_accelerator(config.device, config.precision)
    model, tokenizer = load_base(config.model)
    tokenized = partial(
        tokenize_rows, tokenizer=tokenizer, max_tokens=config.max_tokens, overlong=config.overlong
    )
    data = _checked(tokenized(rows), "training", config, console)
    held_out = _checked(tokenized(eval_rows), "held-out", config, console)
    base_hash = weights_hash(model)  # of its own weights: afterwards PEFT's layers stand among them
    student = TextStudent(model, tokenizer, config, accelerator)

    steps = _StepPlan([len(example.tokens) for example in data.examples], config)
    hashes = {
        "base_hash": base_hash,
        "data_hash": content_hash(rows),
        "eval_hash": content_hash(eval_rows),
    }
    run = TrainingRun(
        config.run_folder,
        loop_config(config, steps.num_steps),
        student.parameters,
        accelerator,
        _fingerprint(config) | hashes,
    )
    _begin(run, student, held_out, config, console)
    records = run.steps(step_losses(student, data.examples, steps.batches))
    for _ in with_progress(
        records, title=config.out.name, done=run.step, num_steps=steps.num_steps, console=console
    ):
        pass

    after = student.mean_loss(held_out.examples, config.batch_rows)
    run.metrics.append({"step": run.step, "eval_loss": after})
    plot_losses(run.metrics.rows(), run.folder / "loss.png", f"{config.out.name}: rank {config.rank}")
    report = TrainReport(
        config.out,
        run.folder,
        run.step,
        run.notes["eval_loss_before"],
        after,
        round(run.notes["train_seconds"], 1),
    )
    write_adapter(
        student,
        config,
        _record(config, report, data, held_out, hashes, describe_environment(accelerator.device)),
    )
    console.print(
        f"{config.out}: held-out loss {report.eval_loss_before:.3f} -> {after:.3f} after {run.step} steps, "
        f"{report.train_seconds:.0f} s; metrics and plot in {run.folder}",
        soft_wrap=True,
    )
    return report


class _StepPlan:
    """Which rows each optimizer step sees: a function of the step, so there is no position to store."""

    def __init__(self, lengths: list[int], config: TextTrainConfig) -> None:
        self.lengths, self.config = lengths, config
        self.steps_per_epoch = steps_per_epoch(config, len(lengths))
        self.num_steps = num_steps(config, len(lengths))

    def batches(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, self.steps_per_epoch)
        batches = plan_batches(self.lengths, self.config.batch_rows, self.config.seed, epoch)
        return batches[index * self.config.accumulate : (index + 1) * self.config.accumulate]


def _rows(config: TextTrainConfig) -> tuple[list[Row], list[Row]]:
    rows = read_rows(config.data)
    if config.eval_data is None:
        return split_rows(rows, config.eval_fraction, config.seed)
    return rows, read_rows(config.eval_data)


def _checked(data: Dataset, what: str, config: TextTrainConfig, console: Console) -> Dataset:
    if data.num_truncated or data.num_dropped:
        console.print(
            f"{what} rows over {config.max_tokens} tokens: "
            f"{data.num_truncated} cut at the end, {data.num_dropped} dropped"
        )
    if not data.examples:
        raise DataError(
            f"no {what} row fits into max_tokens = {config.max_tokens} with a part of its answer"
        )
    return data


def _fingerprint(config: TextTrainConfig) -> dict[str, Any]:
    settings = {
        f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NOT_OF_THE_TRAJECTORY
    }
    return settings | {"targets": list(config.targets)}  # as JSON gives it back


def _begin(
    run: TrainingRun, student: TextStudent, held_out: Dataset, config: TextTrainConfig, console: Console
) -> None:
    """Take up the run where it stands, or measure the base and begin."""
    if take_up(run, console, resume=config.resume):
        return
    before = student.base_loss(held_out.examples, config.batch_rows)
    run.notes["eval_loss_before"] = before
    run.metrics.append({"step": 0, "eval_loss": before})


def _record(
    config: TextTrainConfig,
    report: TrainReport,
    data: Dataset,
    held_out: Dataset,
    hashes: dict[str, str],
    environment: Any,
) -> dict[str, Any]:
    numbers = asdict(report)
    return {
        "command": command_line(config),
        "seed": config.seed,
        **hashes,
        "train_rows": len(data.examples),
        "train_target_tokens": data.num_target_tokens,
        "eval_rows": len(held_out.examples),
        "eval_target_tokens": held_out.num_target_tokens,
        **{
            name: numbers[name]
            for name in ("num_steps", "eval_loss_before", "eval_loss_after", "train_seconds")
        },
        "environment": environment,
    }
