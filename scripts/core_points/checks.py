"""Points that tests show one by one: run them, and say how many passed."""

from collections.abc import Iterator

from points import Line
from tested import tested

GROUPS = {
    "bad input: a message each, the others of the batch unharmed": ["tests/test_bad_input.py"],
    "PEFT files, every key and tensor accounted for": [
        "tests/lora/test_formats.py",
        "tests/lora/test_peft_config.py",
    ],
    "composition: laws and PEFT": ["tests/lora/test_compose.py", "tests/lora/test_peft_oracle.py"],
    "library: local, HTTP, S3; re-pointing under load": [
        "tests/lora/test_library.py",
        "tests/lora/test_sources.py",
    ],
    "attach: exact against PEFT; 1,000 swaps, same weights": ["tests/models/test_attach.py"],
    "pool and caches, random lives": ["tests/memory"],
    "kernels against the slow truth, NaN in unused bytes": ["tests/kernels"],
    "scheduler and loader, random lives": ["tests/text/test_scheduler.py", "tests/text/test_loader.py"],
    "training resumes to the bit after kill -9": ["tests/training", "tests/train"],
}


def lines() -> Iterator[Line]:
    yield from tested(GROUPS)
