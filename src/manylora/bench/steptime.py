"""Is a request on a resident adapter delayed while another one's adapter is loaded? Step times tell.

Requests on resident adapters decode without end; by the clock, requests on cold adapters come in between. The steps
are timed in three arms, in turns:

    resident    no cold request comes
    cold        cold requests come, their adapters are read from disk
    slow        the same, and every read takes `slow_s` longer

Baseline of `slow` is `cold`: both compute the same. An engine that loads within its step would show the whole `slow_s`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from manylora.bench.adapters import adapter_name, write_adapters
from manylora.bench.engine import adapter_room, sequence_room, step
from manylora.errors import ConfigError
from manylora.lora.adapter import Adapter
from manylora.lora.library import Library
from manylora.lora.reader import AdapterRef
from manylora.models.llama import Llama
from manylora.models.sites import base_sites
from manylora.text import Engine, EngineConfig, Output, SamplingParams

PROMPT = (1,)
"""One token: a request that begins anew costs its step what one that goes on does."""

ANSWER_TOKENS = 128
"""Then a resident request begins anew, so that no context grows through the measurement."""

COLD_IN_POOL = 6
"""Adapters that find room beside the resident ones."""


@dataclass(frozen=True, kw_only=True)
class StepTimeConfig:
    """What is measured."""

    resident: int = 8
    """Requests that decode all the time, each on a resident adapter of its own."""

    cold: int = 64
    """Adapters that cold requests name in turn; the pool holds few, so each is cold again when its turn comes."""

    rank: int = 8

    interval_s: float = 0.5
    """Time from one cold request to the next."""

    slow_s: float = 0.2
    """What a slow read takes longer."""

    arm_s: float = 8.0
    """How long each arm is timed in each repeat."""

    repeats: int = 10

    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.resident, self.cold, self.rank, self.repeats) < 1:
            raise ConfigError("resident, cold, rank and repeats must be at least 1")
        if self.arm_s < 4 * self.interval_s:
            raise ConfigError(
                f"an arm of {self.arm_s} s is too short for cold requests every {self.interval_s} s"
            )


@dataclass(frozen=True, kw_only=True)
class StepTimeResult:
    """Over all repeats: one arm of some hundred steps has too few slow ones for a percentile that repeats itself."""

    p99_s: dict[str, float]
    """Arm to the 99th percentile of its step times."""

    ratio: float
    """p99 of slow over p99 of cold."""

    num_steps: dict[str, int]
    adapter_loads: dict[str, int]
    slowest_s: dict[str, float]


class SlowLibrary(Library):
    """A library whose reads take longer."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.delay_s = 0.0

    def load(self, name_or_ref: str | AdapterRef, *, checked: bool = True) -> Adapter:
        time.sleep(self.delay_s)
        return super().load(name_or_ref, checked=checked)


def measure_step_times(model: Llama, config: StepTimeConfig | None = None) -> StepTimeResult:
    """Measure on a loaded model."""
    config = config or StepTimeConfig()
    with TemporaryDirectory(prefix="manylora-steptime-") as folder:
        sites = base_sites(model.config)
        write_adapters(Path(folder), sites, config.resident + config.cold, [config.rank], config.seed)
        library = SlowLibrary(folder)
        with Engine(model, None, library, _engine_config(model, config)) as engine:
            return _measure(engine, library, config)


def _measure(engine: Engine, library: SlowLibrary, config: StepTimeConfig) -> StepTimeResult:
    arms = {"resident": (False, 0.0), "cold": (True, 0.0), "slow": (True, config.slow_s)}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    loads = dict.fromkeys(arms, 0)
    traffic = _Traffic(engine, config)
    for _ in range(config.repeats):
        for arm, (with_cold, delay_s) in arms.items():
            traffic.begin_resident()
            before = engine.stats().adapter_loads
            library.delay_s = delay_s
            times[arm] += traffic.time_steps(with_cold)
            loads[arm] += engine.stats().adapter_loads - before
            library.delay_s = 0.0
            traffic.end()
    p99_s = {arm: float(np.percentile(steps_s, 99)) for arm, steps_s in times.items()}
    return StepTimeResult(
        p99_s=p99_s,
        ratio=p99_s["slow"] / p99_s["cold"],
        num_steps={arm: len(steps_s) for arm, steps_s in times.items()},
        adapter_loads=loads,
        slowest_s={arm: max(steps_s) for arm, steps_s in times.items()},
    )


class _Traffic:
    """The requests of the measurement: which are open, and which comes next."""

    def __init__(self, engine: Engine, config: StepTimeConfig) -> None:
        self._engine = engine
        self._config = config
        self._resident: dict[str, int] = {}  # open request to its adapter
        self._cold: set[str] = set()
        self._next_cold = 0

    def begin_resident(self) -> None:
        """Hand in the resident requests and wait until each has a token: then its adapter is in the pool."""
        silent = {self._submit_resident(adapter) for adapter in range(self._config.resident)}
        while silent:
            silent -= {output.request_id for output in self._step()}

    def time_steps(self, with_cold: bool) -> list[float]:
        """Step for `arm_s` seconds; return the seconds of each step."""
        steps_s: list[float] = []
        started = time.perf_counter()
        due = started
        while (now := time.perf_counter()) < started + self._config.arm_s:
            if with_cold and now >= due:
                due += self._config.interval_s
                self._submit_cold()
            before = time.perf_counter()
            outputs = step(self._engine)
            steps_s.append(time.perf_counter() - before)
            self._take(outputs)
        return steps_s

    def end(self) -> None:
        """Cancel what is open, and wait for its end."""
        for request_id in [*self._resident, *self._cold]:
            self._engine.cancel(request_id)
        self._resident.clear()
        self._cold.clear()
        while self._engine.has_work():
            self._engine.step()

    def _step(self) -> list[Output]:
        outputs = step(self._engine)
        self._take(outputs)
        return outputs

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.event is None:
                continue
            self._cold.discard(output.request_id)
            adapter = self._resident.pop(output.request_id, None)
            if adapter is not None:
                self._submit_resident(adapter)

    def _submit_resident(self, adapter: int) -> str:
        request_id = self._submit(adapter, ANSWER_TOKENS)
        self._resident[request_id] = adapter
        return request_id

    def _submit_cold(self) -> None:
        self._cold.add(self._submit(self._config.resident + self._next_cold, 1))
        self._next_cold = (self._next_cold + 1) % self._config.cold

    def _submit(self, adapter: int, max_tokens: int) -> str:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return self._engine.submit(PROMPT, params, adapter_name(adapter))


def _engine_config(model: Llama, config: StepTimeConfig) -> EngineConfig:
    """A pool in which the resident adapters and a few cold ones find room, and the KV of all who run."""
    places = config.resident + COLD_IN_POOL
    each = adapter_room(model, config.rank) + sequence_room(model, len(PROMPT) + ANSWER_TOKENS)
    return EngineConfig(
        pool_bytes=places * each,
        max_num_seqs=2 * places,
        prefix_caching=False,
    )
