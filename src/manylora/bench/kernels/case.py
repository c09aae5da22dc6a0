"""A kernel on one shape: what it must do, who can do it, and how long each of them takes, in turns.

Knows no kernel: an implementation is a call on one of many sets of data, taken one after the other, so that none finds
its data in a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from manylora.kernels import page_memory


@dataclass(frozen=True)
class Work:
    """The least that one call must do."""

    num_bytes: int
    """Bytes to be read from memory once or, by a kernel that changes its rows in place, read and written."""

    flops: int
    """Multiplications and additions."""

    product_rows: int | None = None
    """Rows that share each weight, where the work is a matrix product: then products at so many rows bound it too."""


@dataclass(frozen=True)
class Arm:
    """One implementation."""

    call: Callable[[int], object]
    """Run on set number i."""

    num_sets: int

    answer: Callable[[], Tensor]
    """What it computes on set 0, in a form that all implementations of the case share; called before it is timed."""

    num_warm_calls: int | None = None
    """Calls before the clock starts; None: one for each set, for whoever keeps something between calls."""


@dataclass(frozen=True)
class Case:
    """One kernel on one shape, and its implementations: "ours" first."""

    kernel: str
    shape: str
    """As the option names it; a number of rows where it takes no more."""

    work: Work
    arms: Mapping[str, Arm]
    rate_of: str | None = None
    """The arm whose rate bounds the operations, where that is not products of floats."""

    max_disagreement: float = 1e-3
    """Between implementations, of the largest value: sums in another order."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one call, over the turns of one implementation."""

    median_s: float
    least_s: float
    most_s: float
    num_calls: int


@dataclass
class _Turns:
    """An implementation while it is measured; goes on each time where it stopped."""

    arm: Arm
    next_set: int = 0
    samples_s: list[float] = field(default_factory=list)
    num_calls: int = 0

    def call(self, count: int) -> None:
        for _ in range(count):
            self.arm.call(self.next_set)
            self.next_set = (self.next_set + 1) % self.arm.num_sets

    def take(self, sample_s: float) -> None:
        began, calls = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - began) < sample_s or calls == 0:
            self.call(1)
            calls += 1
        self.samples_s.append(elapsed_s / calls)
        self.num_calls += calls

    def times(self) -> Times:
        return Times(
            median_s=median(self.samples_s),
            least_s=min(self.samples_s),
            most_s=max(self.samples_s),
            num_calls=self.num_calls,
        )


def measure(case: Case, *, repeats: int, sample_s: float) -> dict[str, Times]:
    """Time the implementations in turns, A B A B; their answers are compared before.

    Raises:
        RuntimeError: two of them disagree.
    """
    check_agreement(case)
    turns = {name: _Turns(arm) for name, arm in case.arms.items()}
    for one in turns.values():
        warm = one.arm.num_warm_calls
        one.call(one.arm.num_sets if warm is None else warm)
    for _ in range(repeats):
        for one in turns.values():
            one.take(sample_s)
    return {name: one.times() for name, one in turns.items()}


def check_agreement(case: Case) -> None:
    """Raise RuntimeError where an implementation gives another answer than ours, or ours none at all."""
    ours = case.arms["ours"].answer().double()
    largest = ours.abs().max().item()
    if not 0 < largest < torch.inf:
        raise RuntimeError(
            f"{case.kernel} {case.shape}: the largest value is {largest}; nothing was computed"
        )
    for name, arm in case.arms.items():
        error = (arm.answer().double() - ours).abs().max().item() / largest
        if not error <= case.max_disagreement:
            raise RuntimeError(
                f"{case.kernel} {case.shape}: {name} is {error:.2g} of the largest value away from ours"
            )


def num_sets(working_set_bytes: int, set_bytes: int) -> int:
    """Sets of data that together are no smaller than the working set; two at least."""
    return max(2, -(-working_set_bytes // max(1, set_bytes)))


def filled(num_bytes: int, seed: int) -> Tensor:
    """[num_bytes] uint8, in memory as a pool's: normal float32 values, the same million over and over."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))
    values = page_memory(-(-num_bytes // 4), 4).view(torch.float32).view(-1)
    for begin in range(0, len(values), len(block)):
        part = values[begin : begin + len(block)]
        part.copy_(block[: len(part)])
    return values.view(torch.uint8)[:num_bytes]
