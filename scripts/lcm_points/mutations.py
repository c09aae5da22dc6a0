"""Faults put into the sources on purpose: each must be noticed by a test."""

import subprocess
import sys
from collections.abc import Iterator

from points import Line
from tested import ROOT


def lines() -> Iterator[Line]:
    command = [sys.executable, str(ROOT / "scripts" / "mutate_distill.py")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        output, found = [], 0
        for line in run.stdout:
            output.append(line)
            mutation, arrow, test = line.strip().partition(" -> ")
            if arrow:
                found += 1
                name = test.removeprefix("tests/").replace("distill/", "")
                yield Line(f"mutation: {mutation}", name, "a test fails", test != "SURVIVES")
    if run.returncode or not found:
        yield Line(
            "mutations",
            f"{found} tried, exit status {run.returncode}: {''.join(output[-3:])}",
            "none survives",
            False,
        )
