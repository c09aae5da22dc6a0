"""Our engine as a contender. The one file of the benchmark that speaks to it."""

from __future__ import annotations

import time

import torch

from manylora.bench.adapters import adapter_name
from manylora.bench.engine import step
from manylora.bench.text.contender import Job, RunOrder
from manylora.bench.text.pass_clock import PassClock
from manylora.bench.text.timeline import RunFigures, Timeline
from manylora.bench.text.workload import Trace, TraceRequest
from manylora.lora.library import Library
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.text import Engine, EngineConfig, Output, SamplingParams

MAX_BATCH_TOKENS = 512


class ManyLora:
    """Each run has an engine of its own, so that no run finds what an earlier one left in the pool."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        self.model: Llama = load_model(job.model, dtype=job.dtype)
        self.run(RunOrder(max_requests=2, max_output_tokens=2))

    def run(self, order: RunOrder) -> RunFigures:
        trace = order.cut(self.job.trace)
        return self.listen(trace) if order.listen else self.answer(trace)

    def answer(self, trace: Trace) -> RunFigures:
        with make_engine(self.model, Library(self.job.adapters_folder), self.job) as engine:
            if self.job.resident and trace.adapters:
                run_trace(engine, make_resident(trace))
            return run_trace(engine, trace)

    def listen(self, trace: Trace) -> RunFigures:
        """Run with every adapter resident, so that no thread reads one beside the passes that are timed."""
        with make_engine(self.model, Library(self.job.adapters_folder), self.job) as engine:
            if trace.adapters:
                run_trace(engine, make_resident(trace))
            with PassClock(self.model) as clock:
                return run_trace(engine, trace, clock)


def make_engine(model: Llama, library: Library, job: Job) -> Engine:
    """An engine without a prefix cache: what it saved on equal prompts would be no speed."""
    config = EngineConfig(
        pool_bytes=job.pool_bytes,
        max_num_seqs=job.max_batch,
        max_batch_tokens=max(MAX_BATCH_TOKENS, job.max_batch),
        prefix_caching=False,
        kv_cache_dtype=job.kv_cache_dtype,
        adapter_dtype=job.adapter_dtype,
    )
    engine = Engine(model, None, library, config)
    engine.warm_up()
    return engine


def submit(engine: Engine, request: TraceRequest, output_tokens: int) -> str:
    """Hand in a request that is answered greedily with exactly `output_tokens` tokens; return its id."""
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    mixture = {adapter_name(number): weight for number, weight in request.mixture}
    return engine.submit(list(request.prompt), params, mixture)


def run_trace(engine: Engine, trace: Trace, clock: PassClock | None = None) -> RunFigures:
    """Run a trace to its end and measure it.

    Args:
        clock: what listens to the model; its passes are told the seconds of their steps, and handed on.
    Raises:
        ManyLoraError: the reason for which a request failed.
    """
    before = engine.stats()
    timeline = Timeline(len(trace.requests))
    numbers = {submit(engine, request, trace.output_tokens): i for i, request in enumerate(trace.requests)}
    outputs: list[list[int]] = [[] for _ in trace.requests]
    distinct: list[int] = []
    most_kv_bytes = most_adapter_bytes = 0
    while engine.has_work():
        made = step(engine) if clock is None else _timed_step(engine, clock)
        for output in made:
            if output.token_ids:
                timeline.note(numbers[output.request_id], len(output.token_ids))
                outputs[numbers[output.request_id]].extend(output.token_ids)
        stats = engine.stats()
        if made:
            distinct.append(stats.distinct_adapters_last_step)
        most_kv_bytes = max(most_kv_bytes, stats.pool_bytes.kv_in_use)
        most_adapter_bytes = max(most_adapter_bytes, stats.pool_bytes.adapters)
    after = engine.stats()
    return timeline.figures(
        outputs,
        distinct_adapters_per_step=sum(distinct) / len(distinct),
        pool_kv_bytes=most_kv_bytes,
        pool_adapter_bytes=most_adapter_bytes,
        adapter_loads=after.adapter_loads - before.adapter_loads,
        adapter_evictions=after.adapter_evictions - before.adapter_evictions,
        passes=() if clock is None else tuple(one.to_json() for one in clock.passes),
    )


def _timed_step(engine: Engine, clock: PassClock) -> list[Output]:
    before, began_s = len(clock.passes), time.perf_counter()
    made = step(engine)
    for one in clock.passes[before:]:
        one.step_s = time.perf_counter() - began_s
    return made


def make_resident(trace: Trace) -> Trace:
    """One token for each adapter of the trace: afterwards all are in the pool that find room."""
    prompt = trace.requests[0].prompt[:1]
    requests = tuple(TraceRequest(prompt, ((adapter, 1.0),)) for adapter in trace.adapters)
    return Trace(requests, output_tokens=1)
