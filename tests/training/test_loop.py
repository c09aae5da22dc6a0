"""The loop on a linear regression with dropout, so that the random state matters."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, mse_loss

from manylora.errors import ConfigError, TrainingError
from manylora.training.checkpoint import load_latest
from manylora.training.hardware import make_accelerator
from manylora.training.loop import LoopConfig, TrainingRun

DATA = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
TRUTH = torch.tensor([[1.0, -2.0, 0.5, 3.0]])


class Regression:
    """A run, and its loss: four rows a step, in micro-batches."""

    def __init__(self, folder, *, num_micro=1, poison_step=None, drop=0.1, seed=0, **settings):
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.zeros(1, 4))
        self.average = torch.zeros(1, 4)
        self.num_micro, self.poison_step, self.drop = num_micro, poison_step, drop
        config = LoopConfig(**{"num_steps": 12, "learning_rate": 0.3, "checkpoint_every": 4, **settings})
        accelerator = make_accelerator("cpu", "fp32")
        fingerprint = {"seed": seed, "learning_rate": config.learning_rate}
        self.run = TrainingRun(
            folder, config, {"weight": self.weight}, accelerator, fingerprint, {"average": self.average}
        )

    def losses(self, step):
        rows = DATA[step % 10 * 4 :][:4]
        for part in rows.chunk(self.num_micro):
            guess = dropout(part, self.drop) @ self.weight.T
            loss = mse_loss(guess, part @ TRUTH.T) / self.num_micro
            yield loss * math.nan if step == self.poison_step else loss

    def train(self, until=None):
        for record in self.run.steps(self.losses):
            with torch.no_grad():
                self.average.lerp_(self.weight, 0.1)
            if record.step == until:
                break
        return self


def test_it_learns(tmp_path):
    regression = Regression(tmp_path, num_steps=120).train()
    assert torch.allclose(regression.weight, TRUTH, atol=0.5)
    rows = regression.run.metrics.rows()
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert rows[-1]["learning_rate"] == pytest.approx(0.03)


@pytest.mark.parametrize("until", [3, 5, 8, 11])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, until):
    whole = Regression(tmp_path / "whole").train()
    Regression(tmp_path / "cut").train(until=until)
    continued = Regression(tmp_path / "cut")
    assert continued.run.resume() is (until > 4)
    # A generator that stops at `until` has not written the checkpoint of that step.
    assert continued.run.step == (until - 1) // 4 * 4
    continued.train()
    assert torch.equal(continued.weight, whole.weight)
    assert torch.equal(continued.average, whole.average)
    assert continued.average.abs().min() > 0

    def losses(regression):
        return [(row["step"], row["loss"], row["grad_norm"]) for row in regression.run.metrics.rows()]

    assert losses(continued) == losses(whole)


def test_without_its_random_state_a_continued_run_would_differ(tmp_path):
    """Shows that the test above can fail."""
    whole = Regression(tmp_path / "whole").train()
    Regression(tmp_path / "cut").train(until=5)
    continued = Regression(tmp_path / "cut")
    continued.run.resume()
    torch.manual_seed(1)
    assert not torch.equal(continued.train().weight, whole.weight)


def test_micro_batches_add_up_to_the_step(tmp_path):
    """Without dropout, so that both see the same numbers."""
    results = [Regression(tmp_path / str(n), num_micro=n, drop=0).train() for n in (1, 2, 4)]
    for other in results[1:]:
        assert torch.allclose(other.weight, results[0].weight, atol=1e-5)
    assert results[0].weight.abs().min() > 0


def test_gradients_are_clipped(tmp_path):
    regression = Regression(tmp_path, max_grad_norm=1e-3)
    seen = []
    for record in regression.run.steps(regression.losses):
        assert regression.weight.grad is not None
        seen.append((record.grad_norm, regression.weight.grad.norm().item()))
    assert all(before > 1e-3 for before, _ in seen)
    assert all(after == pytest.approx(1e-3, rel=1e-2) for _, after in seen)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    regression = Regression(tmp_path, poison_step=6)
    with pytest.raises(TrainingError, match=r"loss is nan at step 7 of 12.*kept: .*step-00000004"):
        regression.train()
    good = Regression(tmp_path / "good").train(until=6)
    assert torch.equal(regression.weight, good.weight), "the parameters are those of the last good step"
    kept = load_latest(regression.run.checkpoints)
    assert kept is not None
    assert torch.isfinite(kept.parameters["weight"]).all()
    repaired = Regression(tmp_path)
    assert repaired.run.resume()
    assert torch.equal(repaired.train().weight, Regression(tmp_path / "whole").train().weight)


def test_an_infinite_gradient_stops_the_run_before_the_parameters_change(tmp_path):
    regression = Regression(tmp_path)
    # The square root's value at 0 is finite, its slope is not.
    steps = regression.run.steps(lambda step: iter([regression.weight.sqrt().sum()]))
    with pytest.raises(TrainingError, match=r"gradient norm is (nan|inf) at step 1.*No checkpoint"):
        next(steps)
    assert torch.equal(regression.weight, torch.zeros(1, 4))


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    Regression(tmp_path).train()
    other = Regression(tmp_path, learning_rate=0.1, seed=3)
    with pytest.raises(ConfigError) as error:
        other.run.resume()
    assert "learning_rate: checkpoint 0.3, now 0.1" in str(error.value)
    assert "seed: checkpoint 0, now 3" in str(error.value)


def test_forget_starts_afresh(tmp_path):
    Regression(tmp_path).train()
    again = Regression(tmp_path, seed=3)
    again.run.forget()
    assert again.run.resume() is False
    assert len(again.train().run.metrics.rows()) == 12


def test_what_a_reader_notes_of_a_step_is_in_its_checkpoint(tmp_path):
    regression = Regression(tmp_path)
    for record in regression.run.steps(regression.losses):
        regression.run.notes["best"] = record.step
    kept = load_latest(regression.run.checkpoints)
    assert kept is not None
    assert kept.notes["best"] == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive and finite, got nan"),
        ({"max_grad_norm": 0}, "max_grad_norm must be positive"),
        ({"warmup_steps": 12}, r"warmup_steps must lie in \[0, num_steps = 12\), got 12"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**{"num_steps": 12, "learning_rate": 0.1, **settings})
