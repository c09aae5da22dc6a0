"""The load generator against a real HTTP server: times, faults, and its own price."""

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from manylora.bench.serve.client import Events, generate_load
from manylora.bench.serve.generator import generate
from manylora.bench.serve.job import MISSED, Job, Outcome, Report, ServeRequest
from tests.bench.openai_double import FAULTS, FIRST_TOKEN_S, TOKEN_S, Double, openai_double


@pytest.fixture
def double():
    with openai_double() as double:
        yield double


def request_of(
    at_s: float, adapter: int | None = None, *, tokens: int = 5, tenant: int = 0
) -> ServeRequest:
    return ServeRequest(at_s, adapter, prompt=(3, 1, 2), output_tokens=tokens, tenant=tenant)


def job_of(double: Double, requests: list[ServeRequest], **settings) -> Job:
    values: dict[str, Any] = dict(
        url=double.url,
        base="base",
        adapters=("fine", *FAULTS),
        keys=(),
        requests=tuple(requests),
        timeout_s=5,
    )
    return Job(**(values | settings))


def run(job: Job) -> Report:
    return asyncio.run(generate_load(job))


def test_events_are_put_together_from_pieces_of_any_size():
    stream = b'data: {"a": 1}\r\n\r\n: a comment\n\ndata:{"b": "\xc3\xa9"}\n\ndata: [DONE]\n\n'
    for size in (1, 2, 7, len(stream)):
        events = Events()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        got = [data for piece in pieces for data in events.feed(piece)]
        assert got == [b'{"a": 1}', b'{"b": "\xc3\xa9"}', b"[DONE]"]


def test_requests_are_sent_at_their_times_and_timed(double):
    requests = [request_of(0.0), request_of(0.1, 0, tokens=20), request_of(0.15, tokens=1)]
    report = run(job_of(double, requests))
    assert [body["model"] for body in double.bodies] == ["base", "fine", "base"]
    first = double.bodies[0]
    assert (first["prompt"], first["max_tokens"], first["ignore_eos"], first["stream"]) == (
        [3, 1, 2],
        5,
        True,
        True,
    )
    assert double.most_at_a_time >= 2
    for request, outcome in zip(requests, report.outcomes, strict=True):
        assert outcome.finished
        assert outcome.planned_s == request.at_s
        assert 0 <= outcome.sent_s - request.at_s < 0.5
        assert outcome.num_tokens == request.output_tokens
        assert outcome.ttft_s is not None
        assert FIRST_TOKEN_S <= outcome.ttft_s < 1
    one, twenty, single = report.outcomes
    assert single.tpot_s is None
    for outcome in (one, twenty):
        assert outcome.tpot_s is not None
        assert 0.9 * TOKEN_S <= outcome.tpot_s < 1
    assert report.wall_s >= 0.1 + FIRST_TOKEN_S + 20 * TOKEN_S
    # A token an event, and of each stream the usage and the end.
    assert report.num_events == 26 + 2 * 3
    assert report.cpu_us_per_token is not None
    assert 0 < report.cpu_us_per_token < 1e6


def test_latency_counts_from_the_planned_time(double):
    outcome = Outcome(
        tenant=0,
        adapter=None,
        prompt_tokens=1,
        asked_tokens=3,
        planned_s=1.0,
        sent_s=3.0,
        first_s=4.0,
        last_s=6.0,
    )
    outcome.num_tokens = 3
    assert (outcome.ttft_s, outcome.tpot_s) == (3.0, 1.0)
    assert [outcome.tokens_by(t) for t in (3.9, 4.0, 4.5, 5.0, 6.0, 9.0)] == [0, 1, 1.5, 2, 3, 3]


@pytest.mark.parametrize(
    ("name", "status", "says", "tokens"),
    [
        ("full", 429, "refused: full", 0),
        ("late", 503, "refused: late", 0),
        ("unknown", 404, "<h1>refused: unknown</h1>", 0),
        ("broken", 200, "ClientPayloadError", 1),
        ("failing", 200, "the adapter is gone", 1),
        ("short", 200, "4 tokens came, 5 were asked for", 4),
        ("garbage", 200, "DecodeError", 0),
        ("slow", 200, "not finished within 0.6 s", 0),
    ],
)
def test_what_goes_wrong_is_told_and_harms_no_other(double, name, status, says, tokens):
    adapter = 1 + FAULTS.index(name)
    report = run(job_of(double, [request_of(0.0, adapter), request_of(0.01, 0)], timeout_s=0.6))
    bad, good = report.outcomes
    assert good.finished
    assert not bad.finished
    assert bad.status == status
    assert says in str(bad.error)
    assert bad.num_tokens == tokens


def test_nobody_listens():
    job = Job("http://127.0.0.1:9", "base", (), (), (request_of(0.0),), timeout_s=5)
    (outcome,) = run(job).outcomes
    assert (outcome.status, outcome.finished, outcome.first_s) == (0, False, None)
    assert "ClientConnectorError" in str(outcome.error)


def test_each_tenant_has_its_key(double):
    run(job_of(double, [request_of(0.0), request_of(0.05, tenant=1)], keys=("sk-a", "sk-b")))
    assert double.keys == ["Bearer sk-a", "Bearer sk-b"]


def test_the_closed_loop_keeps_so_many_under_way(double):
    report = run(job_of(double, [request_of(9.0)] * 2, concurrency=3, closed_s=0.6))
    assert double.most_at_a_time == 3
    done = [outcome for outcome in report.outcomes if outcome.finished]
    cut = [outcome for outcome in report.outcomes if not outcome.finished]
    assert len(done) >= 3
    assert len(cut) <= 3
    assert all(outcome.error == MISSED for outcome in cut)
    assert 0.6 <= report.wall_s < 2


def test_after_the_drain_who_has_no_token_is_cut_off_and_who_has_one_is_heard_out(double):
    slow = 1 + FAULTS.index("slow")  # its first token takes half a minute
    requests = [request_of(0.0, slow), request_of(0.0, tokens=300), request_of(0.1, slow), request_of(0.1)]
    report = run(job_of(double, requests, drain_s=2.0, timeout_s=120))
    assert [outcome.error for outcome in report.outcomes] == [MISSED, None, MISSED, None]
    assert report.outcomes[1].num_tokens == 300
    assert 2.1 <= report.wall_s < 25


def test_the_generator_is_a_process_of_its_own(double):
    requests = [request_of(0.01 * i, 0, tokens=4) for i in range(10)]
    report, load = generate(job_of(double, requests))
    assert [outcome.num_tokens for outcome in report.outcomes] == [4] * 10
    assert all(outcome.finished for outcome in report.outcomes)
    assert load.other_cores >= 0


def test_a_generator_that_dies_says_why(double):
    with pytest.raises(RuntimeError, match=r"ended with code 1(?s:.*)Error"):
        generate(job_of(double, [request_of(0.0, adapter=99)]))


def test_the_generator_imports_nothing_heavy():
    code = (
        "import sys, manylora.bench.serve.client; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "aiohttp" in loaded
    assert not {"torch", "transformers", "numpy"} & set(loaded)
