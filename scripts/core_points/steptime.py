"""A request on a resident adapter is not delayed by another's cold load."""

from collections.abc import Iterator

from manylora.bench.steptime import measure_step_times
from manylora.models.demo_model import DEMO_MODEL
from manylora.models.loading import load_model
from points import Line

BOUND = 1.1


def lines() -> Iterator[Line]:
    result = measure_step_times(load_model(DEMO_MODEL))
    p99 = {arm: f"{seconds * 1e3:.0f} ms" for arm, seconds in result.p99_s.items()}
    yield Line(
        "p99 step time, every read 200 ms slower / as it is",
        f"{result.ratio:.2f} ({p99['slow']} / {p99['cold']}; no loads {p99['resident']})",
        f"<= {BOUND}",
        result.ratio <= BOUND and result.adapter_loads["slow"] > 0,
    )
