"""Bad input of distillation, training and generation: a message each, and what was good is kept."""

from collections.abc import Iterator

from points import Line
from tested import tested

TRAINER = "tests/distill/test_trainer.py"

GROUPS = {
    "broken pictures, empty captions: left out or kept, counted, named": [
        "tests/train/test_image_encoded.py",
        "tests/train/test_image_files.py",
        "tests/train/test_image.py::test_broken_pictures_and_empty_captions_are_told",
        f"{TRAINER}::test_no_pictures",
    ],
    "a loss that is not finite: stops, the last good checkpoint is kept": [
        f"{TRAINER}::test_a_loss_that_is_not_finite_stops_the_run",
        "tests/train/test_image.py::test_a_diverging_run_stops_and_keeps_what_was_there",
    ],
    "kill -9: the run ends with the same bits": [
        f"{TRAINER}::test_a_killed_run_ends_with_the_same_bits",
        "tests/train/test_image.py::test_a_run_killed_by_sigkill_ends_with_the_same_bits",
        "tests/bench/test_image_judge.py::test_a_run_that_is_cut_ends_with_the_same_bits",
    ],
    "full disk: said, and the last good checkpoint is kept": [
        f"{TRAINER}::test_a_full_disk_keeps_the_last_good_checkpoint",
        "tests/train/test_image.py::test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room",
    ],
    "a run of another base or setting is not continued": [
        f"{TRAINER}::test_a_run_of_another_base_or_setting_is_not_continued",
    ],
    "LoRAs of another base fail alone, beside pictures that are made": ["tests/image/test_engine.py"],
}


def lines() -> Iterator[Line]:
    yield from tested(GROUPS)
