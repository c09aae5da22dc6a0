"""The learning rate over a run, as a pure function of the step: nothing to store, nothing to restore."""

import math


def warmup_cosine(step: int, num_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Return the share of the peak learning rate that step `step` (from 0) runs at, in (0, 1].

    Rises linearly over the first `warmup_steps` steps (the first of them already learns), then follows half a
    cosine from 1 down to `final_fraction`, which the last step reaches.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    last_step = max(num_steps - 1, warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / (last_step - warmup_steps))
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))
