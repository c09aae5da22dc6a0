"""The load generator as its parent sees it: start the process, let it begin, take its report."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import msgspec

from manylora.bench.machine import ForeignLoad, LoadWatch
from manylora.bench.serve.job import Job, Report


def generate(job: Job) -> tuple[Report, ForeignLoad]:
    """Run a job in a process of its own; also says what others took of the machine meanwhile.

    Raises:
        RuntimeError: the process ended before it was done; with the end of what it said.
    """
    with (
        tempfile.TemporaryDirectory(prefix="manylora-load-") as folder,
        tempfile.TemporaryFile("w+") as errors,
    ):
        job_file, report_file = Path(folder, "job.json"), Path(folder, "report.json")
        job_file.write_bytes(msgspec.json.encode(job))
        command = [sys.executable, "-m", "manylora.bench.serve.client", str(job_file), str(report_file)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            try:
                _expect("ready", process, errors)
                watch = LoadWatch()
                assert process.stdin is not None
                process.stdin.write("begin\n")
                process.stdin.flush()
                _expect("done", process, errors)
                load = watch.stop()
            except BaseException:
                process.kill()
                raise
        return msgspec.json.decode(report_file.read_bytes(), type=Report), load


def _expect(word: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
    assert process.stdout is not None
    if process.stdout.readline().strip() != word:
        code = process.wait()
        errors.seek(0)
        raise RuntimeError(f"the load generator ended with code {code}:\n{errors.read()[-4000:]}")
