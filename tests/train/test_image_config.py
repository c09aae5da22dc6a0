import math
from pathlib import Path
from typing import Any

import pytest

from manylora.errors import ConfigError
from manylora.train.image_config import TARGETS, ImageTrainConfig

REQUIRED: dict[str, Any] = {"model": "m", "data": Path("d"), "out": Path("somewhere/out")}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank", 0),
        ("batch_rows", 0),
        ("accumulate", -1),
        ("checkpoint_every", 0),
        ("eval_every", 0),
        ("sample_steps", 0),
        ("max_eval_pictures", 0),
        ("max_steps", 0),
        ("size", 4),
        ("num_samples", -1),
        ("epochs", 0.0),
        ("learning_rate", math.nan),
        ("max_grad_norm", math.inf),
        ("dropout", 1.0),
        ("caption_dropout", -0.1),
        ("warmup_fraction", -0.1),
        ("weight_decay", -1.0),
        ("eval_fraction", 1.0),
        ("alpha", 0.0),
        ("min_snr_gamma", -5.0),
        ("min_snr_gamma", math.inf),
        ("sample_guidance", 0.5),
        ("targets", "everything"),
        ("empty_captions", "invent"),
        ("precision", "fp8"),
        ("out_format", "ckpt"),
        ("out_dtype", "int8"),
        ("device", "tpu"),
        ("name", "a/b"),
        ("name", ".."),
    ],
)
def test_a_bad_setting_is_named_with_its_value(setting, value):
    with pytest.raises(ConfigError) as error:
        ImageTrainConfig(**REQUIRED, **{setting: value})
    assert setting in str(error.value)
    assert str(value) in str(error.value)


def test_derived_settings():
    config = ImageTrainConfig(**REQUIRED, rank=3)
    assert config.resolved_alpha == 3.0
    assert ImageTrainConfig(**REQUIRED, alpha=1.0).resolved_alpha == 1.0
    assert config.run_folder == Path.home() / ".cache/manylora/runs/out"
    assert ImageTrainConfig(**REQUIRED, name="n", runs_dir=Path("r")).run_folder == Path("r/n")


def test_each_choice_of_targets_holds_the_one_before():
    attention, with_ff, everything = (set(TARGETS[name]) for name in ("attention", "attention+ff", "all"))
    assert attention < with_ff < everything
    assert {"conv1", "conv2", "conv_shortcut"} <= everything
