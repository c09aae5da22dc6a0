"""What /metrics says is what happened."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from manylora.memory.unified import MemoryUse
from manylora.server.engine_client import EngineError
from manylora.server.messages import UNAVAILABLE, ErrorInfo
from manylora.server.metrics import MAX_ADAPTERS, OTHER_ADAPTERS, Metrics
from manylora.text.stats import EngineStats

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(api: httpx.Client) -> Series:
    answer = api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return parsed(answer.text)


def grown(before: Series, after: Series, name: str, **labels: str) -> float:
    key = (name, tuple(sorted(labels.items())))
    return after[key] - before.get(key, 0.0)


BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


def test_requests_are_counted(api):
    before = scraped(api)
    assert api.post("/v1/completions", json=BODY | {"n": 2}).status_code == 200
    assert api.post("/v1/completions", json=BODY | {"model": "alice", "stream": True}).status_code == 200
    assert api.post("/v1/completions", json=BODY | {"n": 0}).status_code == 400
    after = scraped(api)
    route = "/v1/completions"
    assert grown(before, after, "manylora_http_requests_total", route=route, status="200") == 2
    assert grown(before, after, "manylora_http_requests_total", route=route, status="400") == 1
    assert grown(before, after, "manylora_requests_total", tenant="", outcome="length") == 3
    assert grown(before, after, "manylora_generated_tokens_total", tenant="") == 15
    assert grown(before, after, "manylora_prompt_tokens_total", tenant="") == 10  # once for both samples
    assert grown(before, after, "manylora_time_to_first_token_seconds_count") == 3
    assert grown(before, after, "manylora_inter_token_seconds_count") == 12
    assert grown(before, after, "manylora_request_seconds_count") == 3
    spent = [
        grown(before, after, f"manylora_{name}_seconds_sum") for name in ("time_to_first_token", "request")
    ]
    assert 0 < spent[0] < spent[1]
    assert grown(before, after, "manylora_engine_output_tokens_total") == 15
    assert grown(before, after, "manylora_adapter_loads_total") <= 1  # another test may have brought it
    assert after["manylora_engine_up", ()] == 1


def test_the_kinds_of_memory_add_up_to_the_pool(api, running):
    api.post("/v1/completions", json=BODY | {"model": "bob"})
    series = scraped(api)
    kinds = [value for (name, _), value in series.items() if name == "manylora_pool_bytes"]
    assert len(kinds) == 4
    assert sum(kinds) == running.client.model.pool_bytes
    held = series["manylora_pool_bytes", (("kind", "adapters"),)]
    resident = {dict(labels)["adapter"]: value for (name, labels), value in series.items()
                if name == "manylora_adapter_resident_bytes"}  # fmt: skip
    assert resident["bob"] > 0
    assert sum(resident.values()) == held
    assert series["manylora_adapters_resident", ()] == len(resident)


class Double:
    """The parts of an EngineClient that metrics read, in states that are hard to reach with a real one."""

    is_alive = True
    model = SimpleNamespace(pool_bytes=1000)
    stats = EngineStats(
        num_steps=7,
        step_seconds=0.5,
        num_prefill_tokens=11,
        num_output_tokens=5,
        num_ended=1,
        num_waiting=3,
        num_running=2,
        num_preemptions=1,
        adapter_loads=9,
        adapter_hits=8,
        adapter_evictions=4,
        num_resident_adapters=6,
        prefix_hit_tokens=12,
        distinct_adapters_last_step=2,
        pool_bytes=MemoryUse(adapters=500, kv_in_use=200, prefix_only=100, free=200),
        waiting_adapters=("c",),
        running_adapters=("a", "b"),
    )

    def __init__(self, num_resident: int = 0) -> None:
        self._num_resident = num_resident

    async def residency(self) -> list[dict[str, Any]]:
        if not self.is_alive:
            raise EngineError(ErrorInfo(UNAVAILABLE, "the engine has stopped"))
        return [
            {
                "identity": f"{i:04}",
                "names": (f"adapter-{i}",),
                "num_bytes": 10,
                "is_pinned": i == 0,
                "num_users": i,
            }
            for i in range(self._num_resident)
        ]


@pytest.fixture
def exposed():
    def exposed(client: Any) -> Series:
        return parsed(asyncio.run(Metrics(client).exposition()).decode())

    return exposed


def test_routers_find_what_they_look_for(exposed):
    """`vllm:lora_requests_info` is one series: state in its labels, time as its value."""
    series = exposed(Double())
    ((labels, value),) = [
        (dict(key[1]), v) for key, v in series.items() if key[0] == "vllm:lora_requests_info"
    ]
    assert labels["running_lora_adapters"] == "a,b"
    assert labels["waiting_lora_adapters"] == "c"
    assert int(labels["max_lora"]) > MAX_ADAPTERS
    assert value > 1.7e9
    assert series["vllm:num_requests_waiting", ()] == 3
    assert series["vllm:num_requests_running", ()] == 2
    assert series["vllm:kv_cache_usage_perc", ()] == pytest.approx(0.7)


def test_thousands_of_adapters_are_not_thousands_of_series(exposed):
    series = exposed(Double(num_resident=MAX_ADAPTERS + 900))
    users = {
        dict(labels)["adapter"]: v
        for (name, labels), v in series.items()
        if name == "manylora_adapter_users"
    }
    assert len(users) == MAX_ADAPTERS + 1
    assert f"adapter-{MAX_ADAPTERS + 899}" in users  # those in use come first
    assert sum(users.values()) == sum(range(MAX_ADAPTERS + 900))
    sizes = series["manylora_adapter_resident_bytes", (("adapter", OTHER_ADAPTERS),)]
    assert sizes == 900 * 10
    assert series["manylora_adapters_resident", ()] == MAX_ADAPTERS + 900
    assert series["manylora_adapters_pinned", ()] == 1


def test_what_the_engine_counts_is_passed_on(exposed):
    """Every count of EngineStats moves a series: one that nothing reads would be lost."""
    series = exposed(Double())
    read = {"waiting_adapters", "running_adapters", "pool_bytes", "num_ended", "num_resident_adapters"}
    for field in set(EngineStats.__dataclass_fields__) - read:
        changed = Double()
        values: dict[str, Any] = {field: 123_456}
        changed.stats = replace(Double.stats, **values)
        other = exposed(changed)
        assert any(other[key] == 123_456 for key in series), field


def test_a_dead_engine_still_has_metrics(exposed):
    double = Double(num_resident=3)
    double.is_alive = False
    series = exposed(double)
    assert series["manylora_engine_up", ()] == 0
    assert series["manylora_adapters_resident", ()] == 0
