"""A contender in a process of its own, so that neither memory nor threads of two contenders mix.

    python -m manylora.bench.text.worker NAME JOB.json

reads one order per line from standard input and answers each with one JSON line; the first line says that it is ready.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from manylora.bench.peers.environment import python_of, variables_of
from manylora.bench.peers.table import CONTENDERS, PEERS
from manylora.bench.text.contender import Contender, Job, RunOrder
from manylora.bench.text.timeline import RunFigures


def load_contender(name: str, job: Job) -> Contender:
    module, _, attribute = CONTENDERS[name].partition(":")
    make = cast(Callable[[Job], Contender], getattr(import_module(module), attribute))
    return make(job)


class Worker:
    """The parent's end: starts the process, hands in orders, ends it.

    Raises:
        RuntimeError: the process ended without an answer; with the end of what it wrote to its standard error.
    """

    def __init__(self, name: str, job: Job, job_file: Path) -> None:
        self.name = name
        self._stderr: IO[str] = tempfile.TemporaryFile("w+")
        self._packages = tempfile.TemporaryDirectory(prefix="manylora-worker-")
        python, variables = _environment(name, job.threads, Path(self._packages.name))
        self._process = subprocess.Popen(
            [python, "-m", "manylora.bench.text.worker", name, str(job_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=variables,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, order: RunOrder) -> RunFigures:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; the lack of an answer tells more
            self._process.stdin.write(json.dumps(asdict(order)) + "\n")
            self._process.stdin.flush()
        return RunFigures.from_json(self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            raise RuntimeError(f"{self.name} ended with code {code}:\n{self._stderr.read()[-4000:]}")
        return cast(dict[str, Any], json.loads(line))

    def close(self) -> None:
        """End the process: it stops at the end of its input, or is killed where it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()
        self._packages.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _environment(name: str, threads: int, packages: Path) -> tuple[str, dict[str, str]]:
    """The Python that runs a contender, and the variables of its process."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment = PEERS[name].environment if name in PEERS else None
    if environment is None:
        return sys.executable, variables
    return python_of(environment), variables | variables_of(environment, threads, packages)


@dataclass(frozen=True)
class Turn:
    """What a contender does each time its turn comes, and what came of it."""

    worker: Worker
    order: RunOrder
    once: bool = False
    """Its turn comes in the first round only."""
    runs: list[RunFigures] = field(default_factory=list)


def main(name: str, job_file: str) -> None:
    # Libraries print to standard output as they please; the answers keep it for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = load_contender(name, Job.from_json(json.loads(Path(job_file).read_text())))
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        figures = contender.run(RunOrder(**json.loads(line)))
        print(json.dumps(asdict(figures)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
