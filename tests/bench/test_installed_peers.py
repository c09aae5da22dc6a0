"""Peers that are installed here answer as we do on the real model: with adapters, and without."""

import json
from pathlib import Path

import pytest

from manylora.bench.adapters import write_adapters
from manylora.bench.peers.environment import check_environments
from manylora.bench.peers.models import job_of_peer
from manylora.bench.peers.table import PEERS
from manylora.bench.text.batch_search import best_batch
from manylora.bench.text.contender import Job, RunOrder
from manylora.bench.text.ours import ManyLora
from manylora.bench.text.timeline import RunFigures
from manylora.bench.text.worker import Worker
from manylora.bench.text.workload import Distribution, Trace, make_trace
from manylora.errors import ConfigError
from manylora.models.demo_model import DEMO_MODEL
from manylora.models.loading import load_config
from manylora.models.sites import base_sites

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(3600)]

SEPARATE = [name for name, peer in PEERS.items() if peer.environment is not None]
EXACT = [name for name in SEPARATE if not name.endswith("q8_0")]

NUM_REQUESTS, OUTPUT_TOKENS, NUM_ADAPTERS = 4, 6, 3


def trace_of(num_adapters: int) -> Trace:
    return make_trace(
        num_requests=NUM_REQUESTS,
        prompt_tokens=9,
        output_tokens=OUTPUT_TOKENS,
        vocab_size=49152,
        num_adapters=num_adapters,
        distribution=Distribution.parse("distinct"),
        num_named=1,
        seed=5,
    )


@pytest.fixture(scope="module")
def adapters(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder, base_sites(load_config(DEMO_MODEL)), NUM_ADAPTERS, [8], seed=2)
    return folder


def job_of(adapters: Path, num_adapters: int) -> Job:
    return Job(
        model=DEMO_MODEL,
        dtype="float32",
        threads=1,
        adapters_folder=str(adapters),
        max_batch=NUM_REQUESTS,
        pool_bytes=100 << 20,
        resident=False,
        trace=trace_of(num_adapters),
    )


@pytest.fixture(scope="module")
def ours(adapters: Path) -> dict[int, RunFigures]:
    """Number of adapters to our run."""
    return {number: ManyLora(job_of(adapters, number)).run(RunOrder()) for number in (0, NUM_ADAPTERS)}


def run_peer(name: str, job: Job, folder: Path) -> RunFigures:
    """A short search for its batch, then the trace, as the benchmark orders them."""
    try:
        check_environments([name])
    except ConfigError as error:
        pytest.skip(str(error))
    own = job_of_peer(name, job)
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(own.to_json()))
    with Worker(name, own, job_file) as worker:
        batch = best_batch(name, worker, trace=job.trace, report=lambda _: None)
        return worker.run(RunOrder(batch=batch))


def check_times(figures: RunFigures) -> None:
    assert [len(answer) for answer in figures.outputs] == [OUTPUT_TOKENS] * NUM_REQUESTS
    assert figures.tokens_per_s == pytest.approx(NUM_REQUESTS * OUTPUT_TOKENS / figures.wall_s)
    assert 0 < figures.ttft_p50_s <= figures.ttft_p99_s <= figures.wall_s
    assert 0 < figures.tpot_p50_s < figures.wall_s
    assert 1 << 28 < figures.peak_rss_bytes < 1 << 34


@pytest.mark.parametrize("name", EXACT)
def test_the_base_alone_answers_as_ours_does(name, ours, adapters, tmp_path):
    figures = run_peer(name, job_of(adapters, 0), tmp_path)
    check_times(figures)
    assert figures.outputs == ours[0].outputs


@pytest.mark.parametrize("name", EXACT)
def test_adapters_are_those_that_requests_name(name, ours, adapters, tmp_path):
    assert all(a != b for a, b in zip(ours[NUM_ADAPTERS].outputs, ours[0].outputs, strict=True))
    figures = run_peer(name, job_of(adapters, NUM_ADAPTERS), tmp_path)
    check_times(figures)
    assert figures.outputs == ours[NUM_ADAPTERS].outputs


def test_eight_bits_answer_nearly_so(ours, adapters, tmp_path):
    figures = run_peer("llama-cpp-q8_0", job_of(adapters, 0), tmp_path)
    check_times(figures)
    same = [a == b for ours_, theirs in zip(ours[0].outputs, figures.outputs, strict=True)
            for a, b in zip(ours_, theirs, strict=True)]  # fmt: skip
    assert sum(same) >= len(same) / 2
