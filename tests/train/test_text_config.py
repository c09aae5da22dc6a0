import math
from pathlib import Path
from typing import Any

import pytest

from manylora.errors import ConfigError
from manylora.train.text_config import TextTrainConfig

REQUIRED: dict[str, Any] = {"model": "m", "data": Path("d"), "out": Path("somewhere/out")}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank", 0),
        ("batch_rows", 0),
        ("accumulate", -1),
        ("checkpoint_every", 0),
        ("max_steps", 0),
        ("max_tokens", 1),
        ("epochs", 0.0),
        ("learning_rate", math.nan),
        ("max_grad_norm", math.inf),
        ("dropout", 1.0),
        ("warmup_fraction", -0.1),
        ("weight_decay", -1.0),
        ("eval_fraction", 1.0),
        ("alpha", 0.0),
        ("targets", ()),
        ("targets", ("all-linear", "q_proj")),
        ("overlong", "keep"),
        ("precision", "fp8"),
        ("out_dtype", "int8"),
        ("device", "tpu"),
        ("name", "a/b"),
        ("name", ".."),
        ("name", ""),
    ],
)
def test_a_bad_setting_is_named_with_its_value(setting, value):
    with pytest.raises(ConfigError) as error:
        TextTrainConfig(**REQUIRED, **{setting: value})
    assert setting in str(error.value)
    assert str(value) in str(error.value)


def test_derived_settings():
    config = TextTrainConfig(**REQUIRED, rank=3)
    assert config.resolved_alpha == 6.0
    assert TextTrainConfig(**REQUIRED, alpha=1.0).resolved_alpha == 1.0
    assert config.run_folder == Path.home() / ".cache/manylora/runs/out"
    assert TextTrainConfig(**REQUIRED, name="n", runs_dir=Path("r")).run_folder == Path("r/n")
