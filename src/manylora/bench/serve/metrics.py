"""What a server's /metrics say of the engine during a run: scraped now and then, and summed up."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from types import TracebackType
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

INTERVAL_S = 1.0
"""Between two scrapes: often enough to average a gauge, seldom enough not to be felt."""

Scrape = dict[str, float]
"""Series without labels, by name."""


@dataclass(frozen=True, kw_only=True)
class EngineCounts:
    """What the engine did in a run."""

    steps: int
    step_s: float | None
    """Mean time of a step; None where there was none."""

    distinct_adapters_per_step: float | None
    """Mean of the last step's, over the scrapes that found the engine at work; None where none did."""

    adapter_loads: int
    adapter_hits: int
    adapter_evictions: int
    preemptions: int

    @classmethod
    def of(cls, scrapes: Sequence[Scrape]) -> EngineCounts:
        """Return what lies between the first scrape and the last."""
        first, last = scrapes[0], scrapes[-1]

        def grown(name: str) -> int:
            return int(last[name] - first[name])

        steps = grown("manylora_steps_total")
        seconds = last["manylora_step_seconds_total"] - first["manylora_step_seconds_total"]
        at_work = [
            each["manylora_step_adapters"] for each in scrapes if each["manylora_requests_running"] > 0
        ]
        return cls(
            steps=steps,
            step_s=seconds / steps if steps else None,
            distinct_adapters_per_step=mean(at_work) if at_work else None,
            adapter_loads=grown("manylora_adapter_loads_total"),
            adapter_hits=grown("manylora_adapter_hits_total"),
            adapter_evictions=grown("manylora_adapter_evictions_total"),
            preemptions=grown("manylora_preemptions_total"),
        )


class MetricsWatch:
    """Scrapes from its beginning to its end, in a thread.

    with MetricsWatch(read) as watch:
        ...
    watch.counts
    """

    def __init__(self, read: Callable[[], Scrape], interval_s: float = INTERVAL_S) -> None:
        self._read = read
        self._interval_s = interval_s
        self._scrapes: list[Scrape] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="metrics", daemon=True)

    @property
    def counts(self) -> EngineCounts:
        return EngineCounts.of(self._scrapes)

    def __enter__(self) -> Self:
        self._scrape()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if error is None:
            self._scrape()  # what the engine has told by now: it tells the last of a run as it falls idle

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._scrape()
            except (urllib.error.URLError, TimeoutError):
                continue  # a server at its limit may miss a scrape; the last one, which must not, is taken at the end

    def _scrape(self) -> None:
        self._scrapes.append(self._read())


def parse_metrics(text: str) -> Scrape:
    """Read Prometheus' text format; series with labels are left out."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
