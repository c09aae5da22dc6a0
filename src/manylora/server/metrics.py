"""What the server tells Prometheus. Names and labels are frozen by tests/server/metrics.json.

What happens to requests is counted here as it happens; what the engine counts is read from its newest `Stats` when
somebody asks. Labels are bounded: tenants by the key file, adapters by MAX_ADAPTERS, all else by the code.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from manylora.server.engine_client import EngineClient, EngineError

CONTENT_TYPE = CONTENT_TYPE_LATEST

MAX_ADAPTERS = 100
"""Most adapters with a series of their own; the others are summed up as OTHER_ADAPTERS."""

MAX_LORA = 1_000_000
"""What routers take for the most adapters that fit into a step. There is no such limit, so it is one never reached."""

OTHER_ADAPTERS = "+others"
"""A label that no adapter can have: "+" stands in no name."""

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 60, 120)
_BETWEEN_TOKENS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    2.5,
    5,
)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """All series of one server, in a registry of their own."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._registry = registry = CollectorRegistry()
        self.http_requests = Counter(
            "manylora_http_requests", "Answers by route and status.", ["route", "status"], registry=registry
        )
        self.requests = Counter(
            "manylora_requests",
            "Samples asked for that ended, by outcome: stop, length, cancelled, or the kind of error.",
            ["tenant", "outcome"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "manylora_prompt_tokens",
            "Tokens of prompts that reached a first token.",
            ["tenant"],
            registry=registry,
        )
        self.cached_tokens = Counter(
            "manylora_prompt_cached_tokens",
            "Of those, tokens whose KV was in the prefix cache.",
            ["tenant"],
            registry=registry,
        )
        self.generated_tokens = Counter(
            "manylora_generated_tokens", "Tokens that answers consist of.", ["tenant"], registry=registry
        )
        self.first_token_s = Histogram(
            "manylora_time_to_first_token_seconds",
            "From the request's head to the first token of a sample.",
            registry=registry,
            buckets=_FIRST_TOKEN_S,
        )
        self.between_tokens_s = Histogram(
            "manylora_inter_token_seconds",
            "Between two tokens of a sample.",
            registry=registry,
            buckets=_BETWEEN_TOKENS_S,
        )
        self.request_s = Histogram(
            "manylora_request_seconds",
            "From the request's head to the last token of a sample.",
            registry=registry,
            buckets=_REQUEST_S,
        )
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._resident: Sequence[dict[str, Any]] = ()
        registry.register(self)

    # -- exposition

    async def exposition(self) -> bytes:
        """All series as text. Asks the engine which adapters are resident."""
        try:
            self._resident = await self._client.residency()
        except EngineError:  # it has ended, which is when the rest is most wanted
            self._resident = ()
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What is read at the moment of asking."""
        stats, model = self._client.stats, self._client.model
        yield _gauge("manylora_engine_up", "1 while the engine process runs.", float(self._client.is_alive))
        yield _gauge(
            "manylora_requests_waiting", "Samples that wait for memory or adapters.", stats.num_waiting
        )
        yield _gauge("manylora_requests_running", "Samples that the next step advances.", stats.num_running)
        yield _gauge(
            "manylora_step_adapters",
            "Distinct adapters in the last step.",
            stats.distinct_adapters_last_step,
        )
        yield _counter("manylora_steps", "Forward passes.", stats.num_steps)
        yield _counter("manylora_step_seconds", "Time spent in them.", stats.step_seconds)
        yield _counter(
            "manylora_engine_prefill_tokens", "Tokens computed to fill KV.", stats.num_prefill_tokens
        )
        yield _counter("manylora_engine_output_tokens", "Tokens sampled.", stats.num_output_tokens)
        yield _counter("manylora_preemptions", "Samples that gave up their memory.", stats.num_preemptions)
        yield _counter(
            "manylora_prefix_cache_hit_tokens", "Tokens not computed again.", stats.prefix_hit_tokens
        )
        yield _counter("manylora_adapter_loads", "Adapters copied into the pool.", stats.adapter_loads)
        yield _counter("manylora_adapter_hits", "Requests that found an adapter there.", stats.adapter_hits)
        yield _counter("manylora_adapter_evictions", "Adapters that made room.", stats.adapter_evictions)
        pool = GaugeMetricFamily(
            "manylora_pool_bytes", "Who holds the pool; the kinds add up.", labels=["kind"]
        )
        held = stats.pool_bytes
        for kind in ("adapters", "kv_in_use", "prefix_only", "free"):
            pool.add_metric([kind], getattr(held, kind))
        yield pool
        yield from self._residency()
        # What routers of other servers look at, under the names of vLLM.
        yield _gauge("vllm:num_requests_waiting", "As vLLM has it.", stats.num_waiting)
        yield _gauge("vllm:num_requests_running", "As vLLM has it.", stats.num_running)
        used = 1 - (held.free + held.prefix_only) / model.pool_bytes if model.pool_bytes else 0
        yield _gauge(
            "vllm:kv_cache_usage_perc", "Share of the pool that is neither free nor idle prefixes.", used
        )
        yield self._lora_requests()

    def _residency(self) -> Iterable[Metric]:
        size = GaugeMetricFamily(
            "manylora_adapter_resident_bytes",
            "Bytes of the pool that an adapter holds.",
            labels=["adapter"],
        )
        users = GaugeMetricFamily("manylora_adapter_users", "Samples that use it now.", labels=["adapter"])
        ranked = sorted(
            self._resident, key=lambda one: (-one["num_users"], -one["num_bytes"], one["identity"])
        )
        for one in ranked[:MAX_ADAPTERS]:
            label = ",".join(sorted(one["names"])) or str(one["identity"])
            size.add_metric([label], one["num_bytes"])
            users.add_metric([label], one["num_users"])
        if rest := ranked[MAX_ADAPTERS:]:
            size.add_metric([OTHER_ADAPTERS], sum(one["num_bytes"] for one in rest))
            users.add_metric([OTHER_ADAPTERS], sum(one["num_users"] for one in rest))
        pinned = sum(one["is_pinned"] for one in self._resident)
        return (
            size,
            users,
            _gauge("manylora_adapters_resident", "Adapters in the pool.", len(self._resident)),
            _gauge("manylora_adapters_pinned", "Of those, adapters that stay.", pinned),
        )

    def _lora_requests(self) -> Metric:
        """The state is in the labels and the time is the value, as vLLM has it: routers read the newest."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of requests that run and that wait.",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        stats = self._client.stats
        running, waiting = (
            ",".join(names[:MAX_ADAPTERS]) for names in (stats.running_adapters, stats.waiting_adapters)
        )
        family.add_metric([running, waiting, str(MAX_LORA)], time.time())
        return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
