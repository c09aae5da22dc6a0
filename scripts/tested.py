"""Points that tests show one by one: run a group of them, and say how many passed."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from points import Line

ROOT = Path(__file__).parents[1]


def tested(groups: Mapping[str, Sequence[str]]) -> Iterator[Line]:
    """Run each group's tests, given as pytest's arguments. A group of which nothing ran has failed."""
    for point, arguments in groups.items():
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            *arguments,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        passed = re.search(r"(\d+) passed", done.stdout)
        summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
        yield Line(point, summary.strip("= "), "all", done.returncode == 0 and passed is not None)
