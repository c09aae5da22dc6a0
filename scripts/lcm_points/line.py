"""One line of the report: a point, what was measured, the bound, and whether it is kept."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    point: str
    figure: str
    bound: str
    ok: bool

    def __str__(self) -> str:
        return f"{'pass' if self.ok else 'FAIL'}  {self.point:<66}  {self.figure:<50}  {self.bound}"


def missing(point: str, command: str) -> Line:
    """The line of a point whose record nobody has made."""
    return Line(point, "no kept record", f"run `{command}`", False)
