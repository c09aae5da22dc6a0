"""Real servers for the points: `manylora serve` in processes of its own, and how much memory they take."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from manylora.bench.serve.server import Server, started_server
from manylora.lora.formats import save_peft
from manylora.models.tiny import save_tiny, tiny_adapter, tiny_config

TINY_ADAPTERS = 8


@contextmanager
def tiny_server(folder: Path, *options: str) -> Iterator[Server]:
    """Serve the tiny model with adapters "tiny-0" .. "tiny-7"; more options of `manylora serve` may follow."""
    model = save_tiny(folder / "tiny")
    names = [f"tiny-{number}" for number in range(TINY_ADAPTERS)]
    for seed, name in enumerate(names):
        save_peft(tiny_adapter(tiny_config(), seed=seed, name=name), folder / "adapters" / name)
    with started_server(str(model), folder / "adapters", names, 1, options) as server:
        yield server


def openai_client(server: Server) -> AsyncOpenAI:
    """The real client, which repeats nothing: a request that fails shall be seen."""
    return AsyncOpenAI(base_url=server.url + "/v1", api_key=server.keys[0], max_retries=0, timeout=600)


def headers(server: Server) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {server.keys[0]}"}


def by_label(text: str, name: str, label: str) -> Counter[str]:
    """A series of /metrics, added up by one of its labels."""
    values: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                values[sample.labels[label]] += sample.value  # type: ignore[assignment]  # a float
    return values


def server_rss_bytes() -> int:
    """Memory of every process below this one: both of a server's."""
    return sum(process.memory_info().rss for process in psutil.Process().children(recursive=True))
