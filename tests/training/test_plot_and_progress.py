import io

import pytest
import torch
from rich.console import Console

from manylora.errors import ConfigError
from manylora.training.hardware import Precision, describe_environment, make_accelerator
from manylora.training.loop import StepRecord
from manylora.training.plot import plot_losses, running_mean
from manylora.training.progress import with_progress


def test_running_mean():
    assert running_mean([1.0, 3.0, 5.0, 7.0], share=0.5) == [1.0, 2.0, 4.0, 6.0]
    assert running_mean([2.0, 4.0], share=0.01) == [2.0, 4.0]
    assert running_mean([], share=0.5) == []


def test_the_plot_is_a_picture(tmp_path):
    rows = [
        {"step": 0, "eval_loss": 3.0},
        *({"step": s, "loss": 3.0 / s} for s in range(1, 20)),
        {"step": 19, "eval_loss": 0.5},
    ]
    plot_losses(rows, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot_losses(rows[1:2], tmp_path / "one.png", "one step, nothing held out")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "loss.png").read_bytes()


def test_the_bar_passes_records_on():
    records = [StepRecord(step, 1.5, 0.1, 1.0, 0.01) for step in (3, 4, 5)]
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120)
    assert list(with_progress(iter(records), title="json", done=2, num_steps=5, console=console)) == records
    assert "5/5" in written.getvalue()
    assert "loss 1.500" in written.getvalue()


def test_runs_of_other_precision_follow_each_other_in_one_process():
    runs: list[tuple[Precision, torch.dtype]] = [("fp32", torch.float32), ("bf16", torch.bfloat16)]
    for precision, dtype in runs + runs:
        accelerator = make_accelerator("cpu", precision)
        with accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        make_accelerator("cuda", "fp32")


def test_the_environment_is_described():
    described = describe_environment(torch.device("cpu"))
    assert described["torch"] == torch.__version__
    assert str(described["device"]).startswith("cpu")
