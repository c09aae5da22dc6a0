"""Points that tests show one by one: run them, and say how many passed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from core_points.line import Line

ROOT = Path(__file__).parents[2]

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
    for point, paths in GROUPS.items():
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *paths]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        passed = re.search(r"(\d+) passed", done.stdout)
        summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
        yield Line(point, summary.strip("= "), "all", done.returncode == 0 and passed is not None)
