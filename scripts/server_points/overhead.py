"""What the server costs the engine: its thread between steps and the lock it shares, and the throughput that is left.

The trace has, of each step under 64 streams, its begin and end. All that the thread does from one step's end to the
next one's begin is on behalf of HTTP, but for writing the trace. Inside a step, threads that read requests and send
answers can hold the interpreter's lock only while they run, so their processor time bounds what the step waited for
them.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from manylora.bench.adapters import adapter_name, write_adapters
from manylora.bench.serve.generator import generate
from manylora.bench.serve.job import Job, ServeRequest
from manylora.bench.serve.server import Server, started_server
from manylora.bench.text.contender import Job as EngineJob
from manylora.bench.text.ours import make_engine, make_resident, run_trace
from manylora.bench.text.workload import Distribution, Trace, make_trace
from manylora.lora.library import Library
from manylora.models.demo_model import DEMO_MODEL
from manylora.models.loading import load_config, load_model
from manylora.models.sites import base_sites
from points import Line

NUM_STREAMS = 64
NUM_REQUESTS = 192
NUM_ADAPTERS = 16
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64
POOL_BYTES = 1 << 30
BOUND = 0.02

Step = tuple[float, float, int, float, float]
"""Begin and end, in seconds; outputs; processor time of the threads for HTTP by then; tracing since the step before."""


def lines() -> Iterator[Line]:
    config = load_config(DEMO_MODEL)
    trace = make_trace(
        num_requests=NUM_REQUESTS,
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        vocab_size=config.vocab_size,
        num_adapters=NUM_ADAPTERS,
        distribution=Distribution.parse("uniform"),
        num_named=1,
        seed=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder, "adapters")
        write_adapters(adapters, base_sites(config), NUM_ADAPTERS, [16], seed=0)
        served_per_s, steps = _serve(Path(folder), adapters, trace)
        offline_per_s = _offline(adapters, trace)
    yield _thread_line(steps)
    yield Line(
        f"throughput, {NUM_REQUESTS} requests, {NUM_STREAMS} streams at a time",
        f"{served_per_s:.1f} tokens/s over HTTP, {offline_per_s:.1f} offline: {served_per_s / offline_per_s:.1%}",
        "reported as it is",
        True,
    )


def _serve(folder: Path, adapters: Path, trace: Trace) -> tuple[float, list[Step]]:
    """Tokens a second of the trace over HTTP, and its steps."""
    file = folder / "trace.jsonl"
    environment = {"MANYLORA_TRACE": str(file), "PYTHONPATH": str(Path(__file__).parent / "traced")}
    names = [adapter_name(number) for number in range(NUM_ADAPTERS)]
    options = ["--max-num-seqs", str(NUM_STREAMS), "--pool-bytes", str(POOL_BYTES), "--no-prefix-caching"]
    with (
        mock.patch.dict(os.environ, environment),
        started_server(DEMO_MODEL, adapters, names, 1, options) as server,
    ):
        for requests in (make_resident(trace), trace):
            report, _ = generate(_job(server, requests))
    assert all(outcome.finished for outcome in report.outcomes), report.outcomes
    steps = [tuple(json.loads(line)) for line in file.read_text().splitlines()]
    return trace.num_output_tokens / report.wall_s, steps  # type: ignore[return-value]


def _job(server: Server, trace: Trace) -> Job:
    """All requests of the trace at once."""
    requests = tuple(
        ServeRequest(0.0, request.mixture[0][0], request.prompt, trace.output_tokens)
        for request in trace.requests
    )
    return Job(server.url, server.base, server.adapters, server.keys, requests, timeout_s=600)


def _offline(adapters: Path, trace: Trace) -> float:
    """Tokens a second of the same trace with no server."""
    job = EngineJob(
        model=DEMO_MODEL,
        dtype="float32",
        threads=len(os.sched_getaffinity(0)),
        adapters_folder=str(adapters),
        max_batch=NUM_STREAMS,
        pool_bytes=POOL_BYTES,
        resident=True,
        trace=trace,
    )
    with make_engine(load_model(DEMO_MODEL), Library(adapters), job) as engine:
        run_trace(engine, make_resident(trace))
        return run_trace(engine, trace).tokens_per_s


def _thread_line(steps: list[Step]) -> Line:
    full = [step for step in steps if step[2] >= 0.9 * NUM_STREAMS]
    pairs = [(a, b) for a, b in itertools.pairwise(steps) if min(a[2], b[2]) >= 0.9 * NUM_STREAMS]
    point = f"the engine's thread, {len(full)} steps under {NUM_STREAMS} streams: waits for HTTP"
    if len(pairs) < 50:
        return Line(point, f"{len(pairs)} steps with all streams", "at least 50", False)
    stepping_s = sum(b[1] - b[0] for _, b in pairs)
    between = sum(b[0] - a[1] - b[4] for a, b in pairs) / stepping_s
    lock = sum(b[3] - a[3] for a, b in pairs) / stepping_s
    return Line(
        point,
        f"{between:.2%} of a step ({1e3 * stepping_s / len(pairs):.0f} ms) between steps, lock <= {lock:.2%}",
        f"together <= {BOUND:.0%}",
        between + lock <= BOUND,
    )
