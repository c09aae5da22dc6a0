from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.training.schedule import warmup_cosine


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_it_rises_to_the_peak_then_falls_to_the_final_fraction(data):
    num_steps = data.draw(st.integers(2, 60))
    warmup_steps = data.draw(st.integers(0, num_steps - 2))
    final_fraction = data.draw(st.floats(0, 1))
    shares = [warmup_cosine(step, num_steps, warmup_steps, final_fraction) for step in range(num_steps)]
    assert all(0 < share <= 1 for share in shares[:-1])
    rising = shares[: warmup_steps + 1]
    assert all(earlier < later for earlier, later in pairwise(rising))
    after = shares[warmup_steps:]
    assert after[0] == pytest.approx(1.0)
    assert after == sorted(after, reverse=True)
    assert after[-1] == pytest.approx(final_fraction)


def test_values_by_hand():
    assert warmup_cosine(0, 9, 3, 0.2) == 0.25
    assert warmup_cosine(3, 9, 3, 0.2) == 1.0
    assert warmup_cosine(5, 8, 3, 0.2) == pytest.approx(0.6), "half way down the cosine"


def test_a_run_of_one_step_learns():
    assert warmup_cosine(0, 1, 0, 0.1) == 1.0
