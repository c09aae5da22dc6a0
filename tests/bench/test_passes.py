"""What the clock notes of each pass, on the tiny model; the floors by hand."""

from dataclasses import replace

import pytest
import torch

from manylora.bench.ceilings import Ceilings
from manylora.bench.floor import DecoderCosts, adapter_bytes, layer_products
from manylora.bench.text.contender import Job, RunOrder
from manylora.bench.text.ours import ManyLora
from manylora.bench.text.pass_clock import Pass, PassClock, _seen
from manylora.bench.text.pass_floor import step_shares
from manylora.models.loading import load_config
from manylora.models.tiny import tiny_config, tiny_model
from tests.bench.conftest import RANKS, job_of, trace_of

CEILINGS = Ceilings(memory_read_gb_s=1.0, gemm_gflop_s={32: 1.0, 128: 1.0, 512: 2.0})


@pytest.fixture(scope="module")
def job(tiny_model, adapters_folder) -> Job:
    return job_of(tiny_model, adapters_folder, trace_of(4))


@pytest.fixture(scope="module")
def passes(job) -> list[Pass]:
    return [Pass(**one) for one in ManyLora(job).run(RunOrder(listen=True)).passes]


def test_every_step_of_the_trace_is_noted_with_what_it_computed(passes, job):
    # Four requests of 7 + 6 tokens, all at once: one step fills KV, five decode.
    assert [one.num_rows for one in passes] == [4 * 7] + 5 * [4]
    assert [one.is_decode for one in passes] == [False] + 5 * [True]
    assert {one.num_logits for one in passes} == {4}
    assert passes[0].attended == 4 * (1 + 2 + 3 + 4 + 5 + 6 + 7)
    assert [one.kv_tokens for one in passes[1:]] == [4 * tokens for tokens in (8, 9, 10, 11, 12)]
    assert passes[1].attended == passes[1].kv_tokens
    # Requests name adapters 0, 1, 2, 3, whose ranks are dealt out in turn.
    each = [adapter_bytes(load_config(job.model), RANKS[number % len(RANKS)]) for number in range(4)]
    for one in passes:
        assert one.lora_bytes == sum(each)
        assert one.lora_flops == one.num_rows // 4 * sum(each)  # two bytes and two operations a value


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_seconds_are_told_of_one_call_for_all_layers_and_of_many(job, dtype):
    """int8 is one call wherever there are native kernels, float32 on some processors, bfloat16 on none."""
    passes = [Pass(**one) for one in ManyLora(replace(job, dtype=dtype)).run(RunOrder(listen=True)).passes]
    for one in passes:
        parts = one.base_s, one.lora_s, one.attention_s
        assert min(parts) > 0
        assert sum(parts) < one.forward_s < one.step_s


def test_the_base_alone_has_no_lora(job):
    engine = ManyLora(job)
    passes = [Pass(**one) for one in engine.run(RunOrder(listen=True, base_only=True)).passes]
    assert {(one.lora_s, one.lora_bytes, one.lora_flops) for one in passes} == {(0.0, 0, 0)}
    assert engine.run(RunOrder(listen=True)).outputs == engine.run(RunOrder()).outputs


def test_afterwards_nobody_listens():
    model = tiny_model()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with PassClock(model):
        assert sum(len(module._forward_hooks) for module in model.modules()) > 4 * tiny_config().num_layers
    assert hooks == [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]


def test_what_rows_see():
    # A chunk of a prompt at 3..5, a decode at 9, one at 2.
    assert _seen(torch.tensor([3, 4, 5, 9, 2])) == (4 + 5 + 6 + 10 + 3, 6 + 10 + 3)
    assert _seen(torch.tensor([0])) == (1, 1)


def test_floors_by_hand():
    model = tiny_config()
    costs = DecoderCosts(model, itemsize=4)
    decode = Pass(
        num_rows=2, num_logits=2, attended=30, kv_tokens=30, lora_bytes=10**6, lora_flops=10**5,
        base_s=1.0, lora_s=0.004, attention_s=1.0, forward_s=3.0, step_s=4.0,
    )  # fmt: skip
    prefill = Pass(
        num_rows=50, num_logits=1, attended=1275, kv_tokens=50, base_s=0.5, attention_s=0.1, step_s=1.0
    )
    shares = step_shares([prefill, decode, decode], costs, CEILINGS)

    row_flops = 2 * model.num_layers * sum(out * fan_in for out, fan_in in layer_products(model))
    two = shares["decode"]
    assert (two.num_steps, two.spent_s) == (2, 8.0)
    assert two.other_s == pytest.approx(8 - 4 - 0.008)
    assert two.base.floor_s == pytest.approx(2 * 2 * (row_flops + costs.flops_per_logits) / 1e9)
    assert two.lora.floor_s == two.lora.byte_floor_s == pytest.approx(2 * 10**6 / 1e9)
    assert two.lora.reached == pytest.approx(0.25)
    kv_s = 2 * 30 * costs.kv_bytes_per_token / 1e9
    assert two.attention.byte_floor_s == pytest.approx(kv_s)
    one = shares["prefill"]
    assert one.lora.reached == one.lora.floor_s == 0
    assert one.attention.floor_s == pytest.approx(
        max(50 * costs.kv_bytes_per_token / 1e9, 1275 * costs.flops_per_attended / 2e9)
    )
    assert step_shares([decode], costs, CEILINGS).keys() == {"decode"}
