"""Our engine without one of its ideas at a time, as contenders: what each of them brings, in one run with the whole.

The engine has no switches for this. A contender is a process of its own, and here it runs with other parts put in the
place of the engine's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

from manylora.bench.engine import step
from manylora.bench.peers.loop import answer_all, by_mixture
from manylora.bench.text.contender import Job, RunOrder, adapter_name
from manylora.bench.text.ours import ManyLora, make_engine, submit
from manylora.bench.text.split_pool import SplitMemory, SplitScheduler
from manylora.bench.text.timeline import RunFigures, Timeline
from manylora.bench.text.workload import Trace, TraceRequest
from manylora.errors import ConfigError
from manylora.kernels import ops
from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.library import Library
from manylora.models.adapter_pages import ResidentAdapter
from manylora.models.loading import INT8, load_model
from manylora.models.lora_batch import Item, LoraBatchBuilder, RowRange
from manylora.models.sites import Stack, site_name, stack_shape
from manylora.text import Engine
from manylora.text.loader import AdapterLoader
from manylora.text.sequence import AdapterKey


class Replaced(ManyLora):
    """Runs with these parts in the place of the engine's own."""

    parts: Mapping[str, Any]
    """What a module of ours calls it, "module:name", to what it is instead."""

    def answer(self, trace: Trace) -> RunFigures:
        with replaced(self.parts):
            return super().answer(trace)


class WithoutNative(Replaced):
    """The kernels in torch, which any machine runs. The base products are the same in either."""

    def __init__(self, job: Job) -> None:
        if job.dtype == INT8:
            raise ConfigError("int8 products are native kernels; measure without them in float32")
        others = {name: backend for name, backend in ops.BACKENDS.items() if name != "native"}
        self.parts = {"manylora.kernels.ops:BACKENDS": others}
        super().__init__(job)


class WithoutOnecall(Replaced):
    """The same kernels, called by Python layer by layer: as if KV of no dtype could be written in the one call."""

    parts = {"manylora.models.llama:KV_DTYPES": ()}  # noqa: RUF012

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if self.model.native_weights() is None:
            raise ConfigError(
                f"without onecall: on this processor the layers of {job.model} in {job.dtype} are no native call; "
                "choose --dtype int8"
            )


class UngroupedBuilder(LoraBatchBuilder):
    """A segment for each item and adapter, in the order of the items."""

    def _used(self, items: Sequence[Item]) -> list[tuple[AdapterId, list[RowRange]]]:
        return [
            (identity, [(item.begin, item.end, weight)])
            for item in items
            for identity, weight in item.mixture
        ]

    def _in_order(
        self, used: list[tuple[AdapterId, list[RowRange]]], resident: Mapping[AdapterId, ResidentAdapter]
    ) -> list[tuple[AdapterId, list[RowRange]]]:
        return used


class WithoutGrouping(Replaced):
    """Every request's rows by themselves: an adapter that ten requests name is read ten times."""

    parts = {"manylora.text.engine:LoraBatchBuilder": UngroupedBuilder}  # noqa: RUF012  never written to


class WithoutUnified(Replaced):
    """Half of the pool for KV, half for adapters."""

    parts = {  # noqa: RUF012
        "manylora.text.pool:UnifiedMemory": SplitMemory,
        "manylora.text.engine:Scheduler": SplitScheduler,
    }


class BlockingLoader(AdapterLoader):
    """Brings adapters in the step's way: the step goes on when all that were being read or copied are there."""

    def poll(self) -> dict[AdapterKey, Exception]:
        failures = super().poll()
        under_way: list[Future[Any]] = [*self._reading.values(), *self._copying.values()]
        wait(under_way)
        return failures | super().poll()


class WithoutPrefetch(Replaced):
    """No step is computed while adapters are read."""

    parts = {"manylora.text.engine:AdapterLoader": BlockingLoader}  # noqa: RUF012


class WithoutBatching(ManyLora):
    """The requests of one mixture at a time, its weights merged into the base before they run: no LoRA kernel, and no
    two mixtures in a batch. Merging is part of the time, once for each mixture."""

    def __init__(self, job: Job) -> None:
        float_dtype = "float32" if job.dtype == INT8 else job.dtype
        self._library = Library(job.adapters_folder)
        source = load_model(job.model, dtype=float_dtype)
        layers = range(source.config.num_layers)
        self._base: dict[tuple[int, Stack], Tensor] = {
            (layer, stack): source.base_product(layer, stack).dense_weight().clone()
            for layer in layers
            for stack in Stack
        }
        del source
        super().__init__(job)

    def run(self, order: RunOrder) -> RunFigures:
        trace = order.cut(self.job.trace)
        loaded = {n: self._load(n) for n in trace.adapters} if self.job.resident else {}
        outputs: list[list[int]] = [[] for _ in trace.requests]
        with make_engine(self.model, self._library, self.job) as engine:
            timeline = Timeline(len(trace.requests))
            for group in by_mixture(trace.requests):
                mixture = group[0][1].mixture
                self._merge([(loaded.get(n) or self._load(n), weight) for n, weight in mixture])
                answer_all(
                    _BaseOnly(engine),
                    group,
                    batch=self.job.max_batch,
                    output_tokens=trace.output_tokens,
                    timeline=timeline,
                    outputs=outputs,
                )
        return timeline.figures(outputs)

    def _load(self, number: int) -> Adapter:
        return self._library.load(adapter_name(number))

    def _merge(self, mixture: Sequence[tuple[Adapter, float]]) -> None:
        """Make every product of the model that of the base and these adapters. The base's own weights stay aside."""
        config = self.model.config
        for (layer, stack), base in self._base.items():
            weight = base.clone()
            columns = stack_shape(config, stack).columns
            for member, (begin, end) in zip(stack.members, columns, strict=True):
                for adapter, share in mixture:
                    pair = adapter.sites.get(site_name(layer, member))
                    if pair is not None:
                        a, b = pair.lora_a.to(weight.dtype), pair.lora_b.to(weight.dtype)
                        weight[begin:end].addmm_(b, a, alpha=share * pair.scaling)
            product = self.model.base_product(layer, stack)
            product.weight = weight
            product.finish(int8=self.job.dtype == INT8)


class _BaseOnly:
    """The engine as a peer is stepped; what a request names has been merged."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers: dict[str, int] = {}

    def add(self, number: int, request: TraceRequest, output_tokens: int) -> None:
        self._numbers[submit(self._engine, TraceRequest(request.prompt), output_tokens)] = number

    def step(self) -> Iterator[tuple[int, Sequence[int]]]:
        for output in step(self._engine):
            yield self._numbers[output.request_id], output.token_ids


@contextmanager
def replaced(parts: Mapping[str, Any]) -> Iterator[None]:
    """Let names of ours mean something else for a while."""
    before = {}
    for path, part in parts.items():
        module, _, name = path.partition(":")
        before[path] = getattr(import_module(module), name)
        setattr(import_module(module), name, part)
    try:
        yield
    finally:
        for path, part in before.items():
            module, _, name = path.partition(":")
            setattr(import_module(module), name, part)
