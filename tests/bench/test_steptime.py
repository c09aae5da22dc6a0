import pytest

from manylora.bench.steptime import SlowLibrary, StepTimeConfig, measure_step_times
from manylora.errors import ConfigError
from manylora.models.loading import load_model
from manylora.text.loader import AdapterLoader

CONFIG = StepTimeConfig(resident=3, cold=12, rank=2, interval_s=0.1, slow_s=0.5, arm_s=1.0, repeats=1)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


def test_slow_loads_do_not_hold_up_the_steps(model):
    result = measure_step_times(model, CONFIG)
    # The arms are what they are called: cold requests came, and nothing was loaded without them.
    assert result.adapter_loads["resident"] == 0
    assert result.adapter_loads["cold"] >= 4
    assert result.adapter_loads["slow"] >= 1
    assert min(result.num_steps.values()) > 20
    assert result.p99_s["slow"] < CONFIG.slow_s / 2


def test_an_engine_that_loads_within_its_step_shows(model, monkeypatch):
    """The measurement must see what it is made to see."""
    poll = AdapterLoader.poll
    seen = []

    def poll_and_wait(self):
        # Whoever is still reading is waited for, inside the step.
        while self._reading and not all(future.done() for future in self._reading.values()):
            self.wait(1.0)
        seen.append(len(self._reading))
        return poll(self)

    monkeypatch.setattr(AdapterLoader, "poll", poll_and_wait)
    result = measure_step_times(model, CONFIG)
    assert max(seen) > 0
    assert result.slowest_s["slow"] > 0.9 * CONFIG.slow_s
    assert result.slowest_s["cold"] < result.slowest_s["slow"]


def test_the_library_reads_as_late_as_it_is_told(adapters_folder):
    import time

    library = SlowLibrary(adapters_folder)
    library.delay_s = 0.05
    started = time.perf_counter()
    assert library.load("adapter-00000").num_bytes > 0
    assert time.perf_counter() - started >= 0.05


def test_an_arm_without_time_for_cold_requests_is_refused():
    with pytest.raises(ConfigError, match="too short"):
        StepTimeConfig(interval_s=1.0, arm_s=1.0)
