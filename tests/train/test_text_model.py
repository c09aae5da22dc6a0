"""The loss of a batch against transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.errors import ConfigError, ModelError
from manylora.train.text_config import TextTrainConfig
from manylora.train.text_data import tokenize_rows
from manylora.train.text_model import TextStudent, load_base, step_losses
from manylora.training.hardware import make_accelerator
from tests.train.tiny import tiny_model

SMALL: dict[str, Any] = {"rank": 2, "max_tokens": 64}
ROWS = [{"prompt": "a" * n, "completion": "b" * m} for n, m in ((3, 2), (9, 1), (1, 6), (4, 4), (2, 2))]


def make_student(tokenizer, **settings):
    config = TextTrainConfig(
        model="tiny", data=Path("d"), out=Path("o"), device="cpu", **{**SMALL, **settings}
    )
    return TextStudent(tiny_model(), tokenizer, config, make_accelerator("cpu", config.precision))


@pytest.fixture
def examples(tokenizer):
    return tokenize_rows(ROWS, tokenizer, 64, "truncate").examples


def with_effect(student):
    """Give B values, as training would: PEFT begins with zero."""
    for name, parameter in student.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return student


def test_the_loss_is_transformers_own(tokenizer, examples):
    student = with_effect(make_student(tokenizer))
    for example in examples:
        tokens = torch.tensor([example.tokens])
        labels = tokens.masked_fill(~torch.tensor([example.is_target]), -100)
        expected = student.model(input_ids=tokens, labels=labels).loss * sum(example.is_target)
        torch.testing.assert_close(student.loss_sum(student.batch([example])), expected)


def test_padding_changes_nothing(tokenizer, examples):
    student = with_effect(make_student(tokenizer))
    alone = torch.stack([student.loss_sum(student.batch([example])) for example in examples]).sum()
    together = student.loss_sum(student.batch(examples))
    torch.testing.assert_close(together, alone)
    num_targets = sum(sum(example.is_target) for example in examples)
    assert student.mean_loss(examples, batch_rows=2) == pytest.approx(alone.item() / num_targets, rel=1e-5)


def test_the_base_loss_is_that_of_the_base(tokenizer, examples):
    base = make_student(tokenizer)
    student = with_effect(make_student(tokenizer))
    assert student.mean_loss(examples, 2) != pytest.approx(base.mean_loss(examples, 2), rel=1e-3)
    assert student.base_loss(examples, 2) == pytest.approx(base.mean_loss(examples, 2), rel=1e-6)


def test_micro_batches_weigh_every_target_alike(tokenizer, examples):
    student = with_effect(make_student(tokenizer))
    whole = step_losses(student, examples, lambda step: [[0, 1, 2, 3, 4]])
    parts = step_losses(student, examples, lambda step: [[2], [0, 1], [3, 4]])
    assert len(list(parts(0))) == 3
    torch.testing.assert_close(sum(parts(0)), sum(whole(0)))
    means = [student.mean_loss(part, 5) for part in (examples[2:3], examples[:2], examples[3:])]
    assert sum(means) / 3 != pytest.approx(student.mean_loss(examples, 5), rel=1e-4), (
        "a mean of means would not"
    )


@pytest.mark.parametrize(
    ("targets", "sites"),
    [
        (("q_proj",), {"q_proj"}),
        (("q_proj", "down_proj"), {"q_proj", "down_proj"}),
        (("all-linear",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_targets(tokenizer, targets, sites):
    student = make_student(tokenizer, targets=targets)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in student.parameters} == sites
    assert len(student.parameters) == 2 * 2 * len(sites), "A and B in two layers"


def test_targets_that_the_model_lacks_are_named(tokenizer):
    # PEFT trains the others and says nothing.
    with pytest.raises(
        ConfigError, match=r"\['query'\] are no linear modules of 'tiny'; it has .*'q_proj'"
    ):
        make_student(tokenizer, targets=("q_proj", "query"))
    with pytest.raises(ConfigError, match=r"\['lm_head'\] are no linear modules"):
        make_student(tokenizer, targets=("lm_head",))


def test_max_tokens_beyond_the_model(tokenizer):
    with pytest.raises(ConfigError, match="max_tokens is 129, but 'tiny' takes at most 128"):
        make_student(tokenizer, max_tokens=129)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"holds neither config\.json nor a \.gguf file"):
        load_base(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=f"base model '{tmp_path.name}' cannot be loaded"):
        load_base(str(tmp_path))


def test_a_saved_model_is_loaded_in_fp32(tiny_folder, tokenizer):
    model, loaded_tokenizer = load_base(str(tiny_folder))
    assert next(model.parameters()).dtype == torch.float32
    assert loaded_tokenizer("hi").input_ids == tokenizer("hi").input_ids
