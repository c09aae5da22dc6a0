"""Everybody runs the same trace on the same tiny model: the answers must be the same, or speeds mean nothing."""

import json

import pytest

from manylora.bench.peers.hugging_face import PeftPeer, PeftSwitchPeer, TransformersPeer, pad_left
from manylora.bench.peers.table import ABLATIONS, CONTENDERS, PEERS, peer_without
from manylora.bench.text.contender import Job, RunOrder
from manylora.bench.text.ours import ManyLora
from manylora.bench.text.worker import Worker, load_contender
from manylora.kernels.native import tiles
from tests.bench.conftest import NUM_ADAPTERS, job_of, trace_of

ORDER = RunOrder(batch=3)

HERE = [
    name
    for name in CONTENDERS
    if (name not in PEERS or PEERS[name].environment is None)
    and (tiles.is_available() or name != peer_without("onecall"))
]
"""Those that need no environment of their own, and on this processor are no other than ours."""


@pytest.fixture(scope="module")
def answers(tiny_model, adapters_folder):
    """Contender to its figures, on 7 requests with one adapter each."""
    job = job_of(tiny_model, adapters_folder, trace_of(7))
    return {name: load_contender(name, job).run(ORDER) for name in HERE}


def test_adapters_change_answers(answers):
    assert answers["manylora"].outputs != answers["transformers"].outputs


def test_all_who_run_adapters_agree(answers):
    assert answers["manylora"].outputs == answers["peft"].outputs
    assert answers["manylora"].outputs == answers["peft-switch"].outputs


@pytest.mark.parametrize("name", [name for name in ABLATIONS if peer_without(name) in HERE])
def test_what_is_left_out_changes_no_answer(answers, name):
    assert answers[peer_without(name)].outputs == answers["manylora"].outputs


def test_all_who_run_the_base_agree(answers, tiny_model, adapters_folder):
    job = job_of(tiny_model, adapters_folder, trace_of(7))
    assert ManyLora(job).run(RunOrder(base_only=True)).outputs == answers["transformers"].outputs


@pytest.mark.parametrize("name", HERE)
def test_everybody_makes_all_tokens_and_takes_time(answers, name):
    figures = answers[name]
    assert [len(answer) for answer in figures.outputs] == [6] * 7
    assert figures.tokens_per_s == pytest.approx(7 * 6 / figures.wall_s)
    assert 0 < figures.ttft_p50_s <= figures.ttft_p99_s <= figures.wall_s
    assert 0 < figures.tpot_p50_s < figures.wall_s


def test_our_own_figures(answers, tiny_model, adapters_folder):
    ours = answers["manylora"]
    # 7 requests, at most 4 at a time, over 5 adapters.
    assert 1 < ours.distinct_adapters_per_step <= 4
    assert ours.adapter_loads == NUM_ADAPTERS
    assert ours.pool_kv_bytes > 0
    assert ours.pool_adapter_bytes > 0
    base = ManyLora(job_of(tiny_model, adapters_folder, trace_of(7))).run(RunOrder(base_only=True))
    assert base.distinct_adapters_per_step == base.adapter_loads == base.pool_adapter_bytes == 0
    assert base.pool_kv_bytes > 0


def test_resident_adapters_are_not_loaded_within_the_time(tiny_model, adapters_folder):
    job = job_of(tiny_model, adapters_folder, trace_of(7), resident=True)
    ours = ManyLora(job)
    figures = ours.run(ORDER)
    assert figures.adapter_loads == 0
    assert figures.distinct_adapters_per_step > 1
    assert (
        ours.run(RunOrder(base_only=True)).distinct_adapters_per_step == 0
    )  # and none are there to be made resident


def test_mixtures_agree_too(tiny_model, adapters_folder):
    job = job_of(tiny_model, adapters_folder, trace_of(6, num_named=3, distribution="uniform"))
    single = job_of(tiny_model, adapters_folder, trace_of(6, distribution="uniform"))
    ours = ManyLora(job).run(ORDER).outputs
    assert ours != ManyLora(single).run(ORDER).outputs
    assert ours == PeftPeer(job).run(ORDER).outputs
    assert ours == PeftSwitchPeer(job).run(ORDER).outputs


def test_a_part_of_the_trace(tiny_model, adapters_folder, answers):
    peer = TransformersPeer(job_of(tiny_model, adapters_folder, trace_of(7)))
    part = peer.run(RunOrder(batch=2, max_requests=3, max_output_tokens=4)).outputs
    assert part == tuple(answer[:4] for answer in answers["transformers"].outputs[:3])


def test_prompts_of_different_lengths_begin_late():
    tokens, mask = pad_left([[1, 2, 3], [4]])
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_job_survives_json(tiny_model, adapters_folder):
    job = job_of(tiny_model, adapters_folder, trace_of(3, num_named=2))
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_a_worker_that_dies_says_why(tiny_model, adapters_folder, tmp_path):
    job = job_of(tiny_model + "-nowhere", adapters_folder, trace_of(3))
    job_file = tmp_path / "job.json"
    job_file.write_text(json.dumps(job.to_json()))
    with pytest.raises(RuntimeError, match=r"manylora ended with code 1:(.|\n)*nowhere"):
        Worker("manylora", job, job_file)
