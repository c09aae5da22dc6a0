"""What an engine tells of requests, refuses of them, and keeps from other tenants."""

from __future__ import annotations

import pytest

from manylora.errors import CapacityError, ConfigError, OverloadedError, RequestError
from manylora.lifecycle import RequestState
from manylora.lora.adapter import AdapterId
from manylora.text import Engine, EngineConfig, Output, SamplingParams, make_policy
from manylora.text.scheduler import prefix_salt
from tests.text.engines import GREEDY, PAGE_TOKENS, engine, expect

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = list(range(21))
CACHED = 20


def run(served: Engine, tenant: str, mixture: str | None = "d") -> list[Output]:
    served.submit(PROMPT, GREEDY, mixture, tenant=tenant)
    outputs = []
    while served.has_work():
        outputs += served.step()
    assert sum((output.token_ids for output in outputs), ()) == expect(PROMPT, mixture)
    return outputs


@pytest.mark.parametrize("mixture", [None, "d"])
def test_a_tenant_finds_its_own_prefixes_and_nobody_elses(mixture: str | None) -> None:
    with engine() as served:
        found = [
            run(served, tenant, mixture)[0].num_cached_tokens for tenant in ("x", "x", "y", "", "y", "")
        ]
        assert found == [0, CACHED, 0, 0, CACHED, CACHED]
        assert served.stats().prefix_hit_tokens == 3 * CACHED
    assert CACHED % PAGE_TOKENS == 0


def test_the_salt_tells_tenants_and_mixtures_apart() -> None:
    one, other = AdapterId("one"), AdapterId("other")
    salts = [
        prefix_salt(tenant, mixture)
        for tenant in ("", "x", "one", "\udce9")
        for mixture in ((), ((one, 1.0),), ((one, 0.5),), ((other, 1.0),))
    ]
    assert len(set(salts)) == len(salts)


def test_outputs_say_how_long_the_prompt_was() -> None:
    with engine() as served:
        outputs = run(served, "")
    assert {(output.num_prompt_tokens, output.num_cached_tokens) for output in outputs} == {
        (len(PROMPT), 0)
    }


def test_preemption_does_not_count_as_finding_ones_own_prefix() -> None:
    prompts = [[number] * 20 for number in range(8)]
    long = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with engine(num_pages=40) as served:
        for prompt in prompts:
            served.submit(prompt, long)
        outputs = []
        while served.has_work():
            outputs += served.step()
        assert served.stats().num_preemptions > 0
    assert {output.num_cached_tokens for output in outputs} == {0}


def test_the_statistics_add_up() -> None:
    with engine() as served:
        served.submit(PROMPT, GREEDY, {"d": 1.0, "b": 0.5})
        served.submit(PROMPT, GREEDY, "d")
        assert served.stats().num_waiting == 2
        names = set()
        while served.has_work():
            served.step()
            names.add((served.stats().waiting_adapters, served.stats().running_adapters))
        stats = served.stats()
    assert (("b", "d"), ()) in names or ((), ("b", "d")) in names
    assert ((), ("b", "d")) in names
    assert stats.num_prefill_tokens == 2 * len(PROMPT)
    assert stats.num_output_tokens == 24
    assert stats.num_ended == 2
    assert stats.num_resident_adapters == 2
    assert stats.step_seconds > 0


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    with engine(max_waiting=3) as served:
        served.submit(PROMPT, GREEDY)
        served.submit(PROMPT, SamplingParams(n=2, max_tokens=4))
        with pytest.raises(
            OverloadedError, match=r"3 sequences wait already and 1 more would exceed the 3"
        ) as full:
            served.submit(PROMPT, GREEDY, request_id="refused")
        assert full.value.retry_after_s >= 1.0
        while served.has_work():
            served.step()
        served.submit(PROMPT, GREEDY, request_id="refused")
        with pytest.raises(OverloadedError):
            served.submit(PROMPT, SamplingParams(n=3, max_tokens=4))
        with pytest.raises(CapacityError, match="4 samples are more than the 3 that may wait"):
            served.submit(PROMPT, SamplingParams(n=4, max_tokens=4))
        # Several prompts are taken as a whole, or not at all.
        with pytest.raises(OverloadedError, match=r"1 sequences wait already and 3 more"):
            served.submit_all([PROMPT] * 3, GREEDY, request_ids=["x", "y", "z"])
        assert served.stats().num_waiting == 1
        with pytest.raises(RequestError, match="ids must differ"):
            served.submit_all([PROMPT] * 2, GREEDY, request_ids=["x", "x"])
        with pytest.raises(CapacityError, match="4 samples"):
            served.submit_all([PROMPT] * 2, SamplingParams(n=2, max_tokens=4))
        served.submit_all([PROMPT] * 2, GREEDY, request_ids=["x", "y"])
        assert served.stats().num_waiting == 3
    with pytest.raises(ConfigError, match="max_waiting must be at least 1 or none"):
        EngineConfig(max_waiting=0)


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan")])
def test_a_deadline_that_is_no_time_is_refused(deadline_s: float) -> None:
    with engine() as served, pytest.raises(RequestError, match="deadline_s"):
        served.submit(PROMPT, GREEDY, deadline_s=deadline_s)


def test_a_deadline_out_of_reach_ends_in_a_refusal_and_the_others_go_on() -> None:
    with engine(policy=make_policy("slo")) as served:
        run(served, "")  # what a step takes must be known before anything can be too late
        late = served.submit(PROMPT, GREEDY, deadline_s=1e-9)
        kept = served.submit(PROMPT, GREEDY, "d", deadline_s=1e6)
        outputs = []
        while served.has_work():
            outputs += served.step()
    (refusal,) = [output for output in outputs if output.request_id == late]
    assert refusal.event is not None
    assert refusal.event.state is RequestState.FAILED
    assert isinstance(refusal.event.error, OverloadedError)
    answer = sum((output.token_ids for output in outputs if output.request_id == kept), ())
    assert answer == expect(PROMPT, "d")


@pytest.mark.parametrize(
    "options", [{"stop_token_ids": [257], "min_tokens": 2}, {"logit_bias": {1000: 1.0}}]
)
def test_ids_beyond_the_vocabulary_are_refused_when_they_come(options: dict[str, object]) -> None:
    """A banned token that the model does not have broke the step, and with it every request."""
    with engine() as served, pytest.raises(RequestError, match="no id of the vocabulary, 0 to 256"):
        served.submit(PROMPT, SamplingParams.from_dict(options))
