"""What `make show-*` prints: a line for each point, part after part; exit status 1 if any failed."""

import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/: it holds builders that the points share


@dataclass(frozen=True)
class Line:
    """A point, what was measured, the bound, and whether it is kept."""

    point: str
    figure: str
    bound: str
    ok: bool

    def __str__(self) -> str:
        return f"{'pass' if self.ok else 'FAIL'}  {self.point:<66}  {self.figure:<50}  {self.bound}"


def missing(point: str, command: str) -> Line:
    """The line of a point whose record nobody has made."""
    return Line(point, "no kept record", f"run `{command}`", False)


def show(package: str, all_parts: Sequence[str]) -> int:
    """Print the lines of the parts named on the command line, or of all: each is a module of `package`."""
    parts = sys.argv[1:] or all_parts
    if {"-h", "--help"} & set(parts):
        print(f"{str(sys.modules['__main__'].__doc__).strip()}\n\nParts: {', '.join(all_parts)}")
        return 0
    unknown = [part for part in parts if part not in all_parts]
    if unknown:
        sys.exit(f"unknown parts {unknown}; known: {', '.join(all_parts)}")
    failed = 0
    for part in parts:
        began = time.perf_counter()
        for line in importlib.import_module(f"{package}.{part}").lines():
            print(line, flush=True)
            failed += not line.ok
        print(f"      -- {part}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{failed} failed" if failed else "all points shown")
    return 1 if failed else 0
