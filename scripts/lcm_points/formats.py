"""Adapter files: PEFT, diffusers and kohya, read and written; and a full-size LCM-LoRA of SD 1.5."""

from collections.abc import Iterator

from points import Line
from tested import tested

ORACLE = "tests/lora/test_diffusers_oracle.py"

GROUPS = {
    "round trips between PEFT, diffusers and kohya are exact": ["tests/lora/test_single_file.py"],
    "SD 1.5's and SDXL's kohya names are one to one": ["tests/lora/test_unet_names.py"],
    "diffusers loads what we write, we load what it and PEFT write": [
        ORACLE,
        "--deselect",
        f"{ORACLE}::test_a_full_size_lcm_lora_of_sd15",
    ],
    "same picture as diffusers' pipelines, 1/255 at most": ["tests/image/test_pipelines.py"],
    "full size: SD 1.5, rank 64 with all convs, against diffusers + PEFT": [
        "-m",
        "slow or not slow",
        f"{ORACLE}::test_a_full_size_lcm_lora_of_sd15",
    ],
}


def lines() -> Iterator[Line]:
    yield from tested(GROUPS)
