"""What is left out is left out, and only while it shall be. That answers stay the same, test_contenders.py says."""

import itertools
from dataclasses import replace

import pytest
import torch

from manylora.bench.steptime import SlowLibrary
from manylora.bench.text.ablations import (
    UngroupedBuilder,
    WithoutNative,
    WithoutPrefetch,
    WithoutUnified,
    replaced,
)
from manylora.bench.text.contender import RunOrder
from manylora.bench.text.ours import ManyLora, make_engine, submit
from manylora.bench.text.split_pool import SplitMemory
from manylora.errors import CapacityError, ConfigError
from manylora.kernels import native, ops
from manylora.kernels.native.decoder import run_layers
from manylora.lora.adapter import AdapterId
from manylora.models.loading import load_model
from manylora.models.lora_batch import Item, LoraBatchBuilder
from manylora.text import engine as engine_module
from tests.bench.conftest import job_of, trace_of


def items() -> list[Item]:
    first, second = AdapterId("a"), AdapterId("b")
    a, b = ((first, 1.0),), ((first, 0.5), (second, 1.0))
    return [Item(0, 2, a), Item(2, 3, b), Item(3, 5, ()), Item(5, 9, a)]


def test_ungrouped_adapters_have_a_segment_for_each_item():
    pages = torch.zeros(1, 16, dtype=torch.uint8)
    grouped = LoraBatchBuilder(pages, [["q"]])._used(items())
    ungrouped = UngroupedBuilder(pages, [["q"]])._used(items())
    assert [identity for identity, _ in grouped] == ["a", "b"]
    assert [identity for identity, _ in ungrouped] == ["a", "a", "b", "a"]
    rows = sorted(row for _, ranges in grouped for row in ranges)
    assert sorted(row for _, ranges in ungrouped for row in ranges) == rows


def test_parts_are_replaced_for_a_while():
    before = vars(engine_module)["LoraBatchBuilder"]
    with replaced({"manylora.text.engine:LoraBatchBuilder": UngroupedBuilder}):
        assert vars(engine_module)["LoraBatchBuilder"] is UngroupedBuilder
    assert vars(engine_module)["LoraBatchBuilder"] is before is LoraBatchBuilder


@pytest.mark.skipif(not native.AVAILABLE, reason="there are no native kernels here")
def test_without_native_kernels_none_is_called(tiny_model, adapters_folder, monkeypatch):
    calls = []

    def counted(call):
        def counts(*arguments):
            calls.append(len(arguments))
            return call(*arguments)

        return counts

    # Of all layers at once, or of each stack where a processor's float32 products are not native.
    backend = ops.BACKENDS["native"]
    monkeypatch.setitem(ops.BACKENDS, "native", replace(backend, add_lora=counted(backend.add_lora)))
    monkeypatch.setattr("manylora.models.llama.run_layers", counted(run_layers))
    job = job_of(tiny_model, adapters_folder, trace_of(3))
    ManyLora(job).run(RunOrder())
    assert calls
    calls.clear()
    WithoutNative(job).run(RunOrder())
    assert not calls
    assert "native" in ops.available_backends()


def test_int8_cannot_do_without_native_kernels(tiny_model, adapters_folder):
    job = replace(job_of(tiny_model, adapters_folder, trace_of(3)), dtype="int8")
    with pytest.raises(ConfigError, match="float32"):
        WithoutNative(job)


def test_a_split_pool_gives_neither_what_is_the_others():
    memory = SplitMemory(10, 4, prefix_caching=False)
    kv = memory.alloc(5)
    assert memory.pool.num_free == 5
    with pytest.raises(CapacityError):
        memory.alloc(1)
    with memory.for_adapters():
        memory.adapters.insert("a", memory.alloc(3))
        memory.adapters.insert("b", memory.alloc(2))
        with pytest.raises(CapacityError):
            memory.alloc(1)
        memory.adapters.mark_ready("a")
        memory.adapters.acquire("b")
        # The idle one makes room, and KV does not get its pages.
        assert memory.can_alloc(3)
        assert not memory.can_alloc(4)
    memory.check_integrity()
    memory.pool.free(kv[:1])
    assert memory.can_alloc(1)
    assert not memory.can_alloc(2)


def test_a_split_pool_runs_with_less_room_for_adapters(tiny_model, adapters_folder):
    """So small a pool that, split, it holds fewer adapters than there are: they come again and again."""
    job = job_of(tiny_model, adapters_folder, trace_of(10))
    whole = ManyLora(job).run(RunOrder())
    pages = replace(job, pool_bytes=max(whole.pool_kv_bytes, whole.pool_adapter_bytes) * 3 // 2)
    unified, split = ManyLora(pages).run(RunOrder()), WithoutUnified(pages).run(RunOrder())
    assert split.outputs == unified.outputs == whole.outputs
    assert split.pool_adapter_bytes < unified.pool_adapter_bytes
    assert split.adapter_evictions > 0


def test_without_prefetch_the_step_waits_for_what_is_read(tiny_model, adapters_folder):
    """A request runs while another one's adapter is read, slowly: the engine goes on with it, or does not."""
    job = job_of(tiny_model, adapters_folder, trace_of(2))
    model, library = load_model(tiny_model), SlowLibrary(adapters_folder)
    library.delay_s = 1.0

    def steps_meanwhile(parts) -> int:
        with replaced(parts), make_engine(model, library, job) as engine:
            submit(engine, job.trace.on_base().requests[0], 200)
            while not engine.stats().num_running:
                engine.step()
            late = submit(engine, job.trace.requests[1], 1)
            for count in itertools.count(1):
                if any(output.request_id == late for output in engine.step()):
                    return count
        raise AssertionError

    assert steps_meanwhile(WithoutPrefetch.parts) <= 3 < steps_meanwhile({})
