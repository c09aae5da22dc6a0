"""1,000 registered adapters, a pool that holds a quarter of them, random traffic."""

import random
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from manylora.lora.adapter import Adapter
from manylora.lora.library import Library
from manylora.lora.reader import AdapterRef
from manylora.lora.synthetic import generate_adapters
from manylora.memory.adapter_cache import AdapterCache
from manylora.models.sites import base_sites
from manylora.models.tiny import tiny_config, tiny_model
from manylora.text import Engine, EngineConfig, SamplingParams
from points import Line

NUM_ADAPTERS = 1000
NUM_REQUESTS = 3000


class CountingLibrary(Library):
    """Counts how often each adapter is read, and how often one was in the pool when it was."""

    cache: AdapterCache

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.num_needless = 0
        self._lock = threading.Lock()

    def load(self, name_or_ref: str | AdapterRef, *, checked: bool = True) -> Adapter:
        assert isinstance(name_or_ref, AdapterRef)
        with self._lock:
            identity = self.identity(name_or_ref)
            self.num_needless += identity is not None and self.cache.pages(identity) is not None
            self.reads[name_or_ref.name] += 1
        return super().load(name_or_ref, checked=checked)


def lines() -> Iterator[Line]:
    config = tiny_config()
    with tempfile.TemporaryDirectory() as folder:
        names = generate_adapters(folder, base_sites(config), NUM_ADAPTERS)
        library = CountingLibrary(Path(folder))
        sizes = [library.locate(name).num_bytes for name in names]
        settings = EngineConfig(
            pool_bytes=sum(sizes) // 4,
            page_tokens=4,
            max_num_seqs=64,
            max_batch_tokens=256,
            prefix_caching=False,
        )
        with Engine(tiny_model(config), None, library, settings) as engine:
            library.cache = engine._pool.memory.adapters
            draw = random.Random(0)
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            most = 0
            submitted = 0
            while submitted < NUM_REQUESTS or engine.has_work():
                while submitted < NUM_REQUESTS and engine.stats().num_waiting < 64:
                    # Half of the traffic on a tenth of the adapters, so that there are hits to be had.
                    pool = names[:100] if draw.random() < 0.5 else names
                    engine.submit([draw.randrange(256) for _ in range(8)], params, draw.choice(pool))
                    submitted += 1
                engine.step()
                held = engine.stats().pool_bytes
                most = max(most, held.adapters + held.kv_in_use + held.prefix_only)
            stats = engine.stats()
    reads = sum(library.reads.values())
    yield Line(
        "1,000 registered, pool a quarter: bytes resident",
        f"{most / 1e6:.2f} MB at most",
        f"<= {settings.pool_bytes / 1e6:.2f} MB",
        most <= settings.pool_bytes and stats.adapter_evictions > 0,
    )
    resident = library.cache.num_resident
    yield Line(
        "nothing is read twice while resident",
        f"{library.num_needless} of {reads} reads; {stats.adapter_loads} loads - {stats.adapter_evictions} evictions, "
        f"{resident} resident",
        "none; loads - evictions = resident",
        library.num_needless == 0
        and max(library.reads.values()) > 1
        and stats.adapter_loads <= reads
        and stats.adapter_loads - stats.adapter_evictions == resident > 0,
    )
