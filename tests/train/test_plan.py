"""How many steps a run takes."""

from dataclasses import replace
from pathlib import Path

from manylora.train.plan import num_steps
from manylora.train.text_config import TextTrainConfig

CONFIG = TextTrainConfig(
    model="tiny", data=Path("rows.jsonl"), out=Path("out"), epochs=2.5, batch_rows=4, accumulate=3
)


def test_epochs_count_the_last_part_of_a_batch() -> None:
    assert num_steps(CONFIG, num_rows=48) == 10  # 12 batches in fours of rows, three to a step
    assert num_steps(CONFIG, num_rows=49) == 12  # 13 batches are five steps an epoch


def test_max_steps_goes_before_epochs_whichever_is_more() -> None:
    for wanted in (3, 800):
        assert num_steps(replace(CONFIG, max_steps=wanted), num_rows=48) == wanted
