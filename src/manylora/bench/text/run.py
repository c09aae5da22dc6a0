"""`manylora bench text`: how fast is the engine with many adapters, beside itself without, its peers and its ceilings?

Baseline: the same engine on the base alone, in the same run. Ceiling: the time that reading and multiplying take at
the rates measured on this machine (floor.py). Contenders run in turns, A B C A B C, each in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from manylora.bench.adapters import write_adapters
from manylora.bench.ceilings import measure_ceilings
from manylora.bench.floor import DecoderCosts, adapter_bytes, layer_products
from manylora.bench.machine import LoadWatch, check_idle
from manylora.bench.peers.environment import check_environments
from manylora.bench.peers.models import job_of_peer
from manylora.bench.peers.table import PEERS, peer_without
from manylora.bench.text.batch_search import BATCHES, best_batch
from manylora.bench.text.config import BenchConfig
from manylora.bench.text.contender import Job, RunOrder
from manylora.bench.text.pass_clock import Pass
from manylora.bench.text.result import BenchResult
from manylora.bench.text.summary import summarise
from manylora.bench.text.worker import Turn, Worker
from manylora.bench.text.workload import Distribution, Trace, make_trace
from manylora.models.config import LlamaConfig
from manylora.models.loading import load_config
from manylora.models.sites import base_sites

Report = Callable[[str], None]
"""Told in a few words what begins now."""


def run(config: BenchConfig, report: Report = lambda _: None) -> BenchResult:
    """Measure.

    Raises:
        ConfigError: the machine is busy, unless `force`; a peer's environment is not there.
        RuntimeError: a contender's process died; with what it said.
    """
    check_environments(config.peers)
    report("looking whether the machine is idle")
    forced = check_idle(force=config.force)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    model = load_config(config.model)
    trace = _trace(config, model)
    report("measuring the ceilings")
    ceilings = measure_ceilings(
        layer_products(model),
        model.num_layers,
        getattr(torch, config.torch_dtype),
        int8=config.dtype == "int8",
        threads=config.num_threads,
    )
    with _prepared(config, model, trace, report) as prepared, ExitStack() as workers:
        turns = _start(config, *prepared, workers, report)
        watch = LoadWatch()
        for repeat in range(config.repeats):
            for name, turn in turns.items():
                if turn.once and turn.runs:
                    continue
                report(f"run {repeat + 1} of {config.repeats}: {name}")
                turn.runs.append(turn.worker.run(turn.order))
                report(f"  {turn.runs[-1].tokens_per_s:.1f} tokens/s")
        load = watch.stop()
        report("listening to every forward pass")
        passes = [Pass(**one) for one in turns["manylora"].worker.run(RunOrder(listen=True)).passes]
    return summarise(
        config, model, trace, ceilings, turns, passes, started=started, load=load, forced=forced
    )


def _trace(config: BenchConfig, model: LlamaConfig) -> Trace:
    return make_trace(
        num_requests=config.requests,
        prompt_tokens=config.prompt_tokens,
        output_tokens=config.output_tokens,
        vocab_size=model.vocab_size,
        num_adapters=config.adapters,
        distribution=Distribution.parse(config.distribution),
        num_named=config.mixture,
        seed=config.seed,
    )


@contextmanager
def _prepared(
    config: BenchConfig, model: LlamaConfig, trace: Trace, report: Report
) -> Iterator[tuple[Job, Path]]:
    """The job with its adapters on disk, and a folder for what else is written, as long as it is measured."""
    with TemporaryDirectory(prefix="manylora-bench-") as folder:
        report(f"writing {config.adapters} adapters")
        adapters_folder = Path(folder, "adapters")
        adapters_folder.mkdir()
        write_adapters(adapters_folder, base_sites(model), config.adapters, config.rank, config.seed)
        yield (
            Job(
                model=config.model,
                dtype=config.dtype,
                kv_cache_dtype=config.kv_cache_dtype,
                adapter_dtype=config.adapter_dtype,
                threads=config.num_threads,
                adapters_folder=str(adapters_folder),
                max_batch=config.max_batch,
                pool_bytes=config.pool_bytes or ample_pool_bytes(config, model, trace),
                resident=config.resident,
                trace=trace,
            ),
            Path(folder),
        )


def _start(
    config: BenchConfig, job: Job, folder: Path, workers: ExitStack, report: Report
) -> dict[str, Turn]:
    """Every contender, ready, with what it is to do."""

    def start(name: str, own: Job) -> Worker:
        report(f"starting {name}")
        job_file = folder / f"{name}.json"
        job_file.write_text(json.dumps(own.to_json()))
        return workers.enter_context(Worker(name, own, job_file))

    engine = start("manylora", job)
    turns = {
        "manylora": Turn(engine, RunOrder()),
        "base": Turn(engine, RunOrder(base_only=True)),
    }
    for name in map(peer_without, config.ablations):
        turns[name] = Turn(start(name, job), RunOrder())
    for name in config.peers:
        worker = start(name, job_of_peer(name, job))
        order = _peer_order(name, worker, job.trace, report)
        turns[name] = Turn(worker, order, once=PEERS[name].once)
    return turns


def _peer_order(name: str, worker: Worker, trace: Trace, report: Report) -> RunOrder:
    """At its best batch; who switches adapters answers as many at a time as name the same."""
    peer = PEERS[name]
    if peer.switches and trace.adapters:
        return RunOrder(batch=peer.max_requests or max(BATCHES), max_requests=peer.max_requests)
    return RunOrder(batch=best_batch(name, worker, trace=trace, report=report))


def ample_pool_bytes(config: BenchConfig, model: LlamaConfig, trace: Trace) -> int:
    """Room for every adapter of the trace and for the KV of as many requests as run at a time."""
    token_bytes = DecoderCosts(model, getattr(torch, config.kv_dtype).itemsize).kv_bytes_per_token
    # Each sequence and each adapter ends with a page that is part full, and packing wastes a few per cent.
    page_bytes = 64 * token_bytes
    sequences = min(config.requests, config.max_batch)
    kv_bytes = sequences * ((config.prompt_tokens + config.output_tokens) * token_bytes + page_bytes)
    sizes = [adapter_bytes(model, config.rank_of(adapter), config.row_dtype) for adapter in trace.adapters]
    return kv_bytes + sum(int(1.1 * size) + page_bytes for size in sizes)
