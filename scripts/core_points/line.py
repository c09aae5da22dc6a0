"""One line of the report: a point, what was measured, the bound, and whether it is kept."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    point: str
    figure: str
    bound: str
    ok: bool

    def __str__(self) -> str:
        return f"{'pass' if self.ok else 'FAIL'}  {self.point:<58}  {self.figure:<44}  {self.bound}"
