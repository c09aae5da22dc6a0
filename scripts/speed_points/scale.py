"""Whether the model of what a step costs holds for steps that it was not fitted to. Read from kept records."""

from collections.abc import Iterator
from statistics import median

import step_cost
from points import Line, missing

MAX_ERROR = 0.15


def lines() -> Iterator[Line]:
    found = step_cost.fit()
    if found is None:
        yield missing("step-cost model", step_cost.COMMAND)
        return
    for name in found.models:
        errors = found.errors(name)
        worst = max(errors, key=abs)
        yield Line(
            f"step-cost model, {len(errors)} steps of {name} that were held out: error",
            f"{worst:+.1%} at most, {median(map(abs, errors)):.1%} in the median",
            f"<= {MAX_ERROR:.0%}; `{step_cost.COMMAND}`",
            abs(worst) <= MAX_ERROR,
        )
