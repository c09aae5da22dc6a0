"""The engine against the merged model: in float64 every token is equal, whatever else is in the batch."""

from __future__ import annotations

import gc
import resource
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.errors import (
    AdapterError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    RequestError,
)
from manylora.lifecycle import RequestState
from manylora.lora.adapter import Adapter
from manylora.lora.library import Library
from manylora.lora.mixture import MixtureLike
from manylora.lora.pairs import LoraPair
from manylora.lora.reader import AdapterRef
from manylora.models.tiny import tiny_adapter, tiny_model, tiny_tokenizer
from manylora.text import AdapterClustering, Engine, Output, SamplingParams
from manylora.text.live import LiveSequence
from tests.text.engines import CONFIG, GREEDY, PAGE_BYTES, PAGE_TOKENS, adapters, engine, expect, library

MIXTURES: list[MixtureLike] = [
    None, "a", "b", "c", "d", "e", "a:0.5",
    {"a": 1.0, "c": -0.5}, {"b": 0.7, "d": 1.5, "e": 0.25}, {"a": 1.0, "c": -0.5},
]  # fmt: skip
PROMPTS = [[(7 * i + j * j) % 256 for j in range(1 + (5 * i) % 23)] for i in range(len(MIXTURES))]


def run(served: Engine, prompts=PROMPTS, mixtures=MIXTURES, params=GREEDY) -> list[tuple[int, ...]]:
    completions = served.generate(prompts, params, mixtures)
    assert [c.error for c in completions] == [None] * len(prompts)
    return [c.token_ids for c in completions]


WANTED = [expect(p, m) for p, m in zip(PROMPTS, MIXTURES, strict=True)]


def test_adapters_change_the_answers() -> None:
    base = [expect(p, None) for p in PROMPTS]
    assert sum(b != w for b, w in zip(base, WANTED, strict=True)) >= len(MIXTURES) - 2


def test_a_mixed_batch_equals_merged_models() -> None:
    with engine() as served:
        assert run(served) == WANTED
        assert served.stats().adapter_loads == len(adapters())


def test_adapters_of_eight_bits_are_those_whose_rank_rows_were_rounded() -> None:
    """And nothing beside: an engine that has the rounded adapters in float32 says the same."""
    rounded = Library()
    for name, adapter in adapters().items():
        rounded.add(name, Adapter({site: _rounded(pair) for site, pair in adapter.sites.items()}))
    with engine(source=rounded) as stored, engine(adapter_dtype="int8") as eight:
        params = replace(GREEDY, logprobs=3)
        wanted, got = (one.generate(PROMPTS, params, MIXTURES) for one in (stored, eight))
        for want, made in zip(wanted, got, strict=True):
            assert made.token_ids == want.token_ids
            for a, b in zip(made.logprobs, want.logprobs, strict=True):
                assert a.sampled == pytest.approx(b.sampled, abs=1e-5)
        assert eight.stats().pool_bytes.adapters < stored.stats().pool_bytes.adapters
    with engine() as exact:
        unrounded = exact.generate(PROMPTS, params, MIXTURES)
    assert [c.logprobs for c in got] != [c.logprobs for c in unrounded]


def _rounded(pair: LoraPair) -> LoraPair:
    def rows(matrix: Tensor) -> Tensor:
        scale = matrix.float().abs().amax(1, keepdim=True) / 127
        return (matrix.float() / scale).round() * scale

    return LoraPair(rows(pair.lora_a), rows(pair.lora_b.T).T.contiguous(), pair.scaling)


def test_without_a_limit_a_request_gets_what_the_pool_has_beside_its_rounded_adapter() -> None:
    source, pages = Library(), 100  # less than the context
    source.add("wide", tiny_adapter(CONFIG, rank=64, dtype=torch.bfloat16, seed=1))
    params = SamplingParams(temperature=0, ignore_eos=True)
    with engine(num_pages=pages, source=source, adapter_dtype="int8") as served:
        (done,) = served.generate([[1, 2, 3]], params, ["wide"])
        adapter_pages = served.stats().pool_bytes.adapters // served._pool.layout.page_bytes
    assert done.error is None
    assert 10 < adapter_pages < pages / 2
    assert len(done.token_ids) > (pages - 3 * adapter_pages) * PAGE_TOKENS


def test_keys_and_values_lie_in_the_dtype_asked_for() -> None:
    with (
        engine(dtype="float32", debug=False) as wide,
        engine(dtype="float32", kv_cache_dtype="bfloat16", debug=False) as narrow,
    ):
        assert 2 * narrow._pool.layout.page_bytes == wide._pool.layout.page_bytes
        params = replace(GREEDY, max_tokens=2, logprobs=1)
        exact, rounded = (
            [c.logprobs for c in one.generate(PROMPTS, params, MIXTURES)] for one in (wide, narrow)
        )
    away = [abs(a[0].sampled - b[0].sampled) for a, b in zip(exact, rounded, strict=True)]
    assert 1e-5 < max(away) < 0.1  # a bfloat16 errs by a 512th


def test_a_base_of_eight_bits_has_keys_of_two_bytes() -> None:
    with engine(dtype="int8") as served:
        assert served._pool.layout.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be one of .*got 'int4'"):
        engine(kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match=r"adapter_dtype must be one of .*got 'float32'"):
        engine(adapter_dtype="float32")


def test_a_warm_engine_finds_no_memory_while_it_runs() -> None:
    """Memory that nobody has written to is found as it is written to, a fault for each piece; once touched, none is."""

    def faults(served: Engine) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        served._pool.pages.fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # Not in debug mode, which writes to all free pages after each step.
    with engine(pool_bytes=32 << 20, debug=False) as cold, engine(pool_bytes=32 << 20, debug=False) as warm:
        warm.warm_up()
        assert faults(warm) < faults(cold) / 2
        assert run(warm) == WANTED


def test_the_pool_of_an_engine_that_is_dropped_is_given_back_at_once() -> None:
    gc.disable()  # it might find the pool by chance
    try:
        with engine() as served:
            assert run(served) == WANTED
            pages = weakref.ref(served._pool.pages)
        assert pages() is not None
        del served
        assert pages() is None
    finally:
        gc.enable()


def test_alone_equals_in_a_batch() -> None:
    with engine() as served:
        alone = [run(served, [p], [m])[0] for p, m in zip(PROMPTS, MIXTURES, strict=True)]
    assert alone == WANTED


LONG = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
NAMES = [None, "d", "b", {"b": 0.5, "d": 1.0}] * 2
"""Small adapters, so that a small pool runs out of pages by KV."""


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_sequences_give_the_same_tokens(prefix_caching: bool) -> None:
    prompts = PROMPTS[: len(NAMES)]
    with engine(num_pages=40, prefix_caching=prefix_caching) as served:
        got = run(served, prompts, NAMES, LONG)
        assert served.stats().num_preemptions > 0
    assert got == [expect(p, m, 30) for p, m in zip(prompts, NAMES, strict=True)]


def test_evicted_and_reloaded_adapters_give_the_same_tokens() -> None:
    with engine(num_pages=26) as served:
        for prompt, mixture, wanted in list(zip(PROMPTS, MIXTURES, WANTED, strict=True)) * 2:
            assert run(served, [prompt], [mixture]) == [wanted]
        stats = served.stats()
        assert stats.adapter_evictions > 0
        assert stats.adapter_loads > len(adapters())


def test_long_prompts_are_computed_in_chunks() -> None:
    prompts = [[(3 * i + j) % 256 for j in range(70)] for i in range(3)]
    with engine() as served:
        assert run(served, prompts, ["a", None, {"b": 1.0, "e": -0.5}]) == [
            expect(prompts[0], "a"),
            expect(prompts[1], None),
            expect(prompts[2], {"b": 1.0, "e": -0.5}),
        ]


def test_prefixes_are_shared_only_between_equal_mixtures() -> None:
    prompt = list(range(40))
    with engine() as served:
        run(served, [prompt], ["a"])
        assert served.stats().prefix_hit_tokens == 0
        assert run(served, [prompt], ["c"]) == [expect(prompt, "c")]
        assert run(served, [prompt], ["a:0.5"]) == [expect(prompt, "a:0.5")]
        assert served.stats().prefix_hit_tokens == 0
        assert run(served, [prompt], ["a"]) == [expect(prompt, "a")]
        assert served.stats().prefix_hit_tokens == len(prompt) // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS


def test_two_names_of_one_content_share_pages_and_prefix() -> None:
    source = library()
    source.add("alias", adapters()["a"])
    prompt = list(range(40))
    with engine(source=source) as served:
        run(served, [prompt], ["a"])
        assert run(served, [prompt], ["alias"]) == [expect(prompt, "a")]
        stats = served.stats()
        assert stats.adapter_loads == 1
        assert stats.prefix_hit_tokens > 0
        assert run(served, [prompt], [{"a": 0.25, "alias": 0.5}]) == [expect(prompt, "a:0.75")]


def test_two_names_of_one_content_fit_where_it_fits_once() -> None:
    source = library()
    source.add("alias", adapters()["a"])
    num_pages = -(-source.locate("a").num_bytes // PAGE_BYTES)
    with engine(num_pages=num_pages + 6, source=source) as served:
        assert run(served, PROMPTS[1:2], [{"a": 0.25, "alias": 0.5}]) == [expect(PROMPTS[1], "a:0.75")]
        with pytest.raises(CapacityError):
            served.submit(PROMPTS[1], GREEDY, {"a": 0.25, "e": 0.5})


def test_a_name_pointed_elsewhere_never_serves_what_it_was() -> None:
    source = library()
    source.add("name", adapters()["a"])
    prompt = list(range(40))
    with engine(source=source) as served:
        before = served.submit(prompt, GREEDY, "name")
        served.step()
        source.point("name", "c")
        after = served.submit(prompt, GREEDY, "name")
        tokens = drain(served)
    assert tokens[before, 0] == expect(prompt, "a")
    assert tokens[after, 0] == expect(prompt, "c")


def test_samples_of_one_prompt_share_its_computation() -> None:
    params = SamplingParams(n=4, seed=3, temperature=1.0, max_tokens=8, ignore_eos=True)
    prompt = list(range(40))
    with engine() as served:
        together = [c.token_ids for c in served.generate([prompt], params, ["a"])]
        assert served.stats().prefix_hit_tokens >= 3 * 36
    assert len(set(together)) > 1
    with engine(prefix_caching=False) as served:
        assert [c.token_ids for c in served.generate([prompt], params, ["a"])] == together


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    prompts = PROMPTS[: len(NAMES)]
    params = [
        SamplingParams(seed=i, temperature=0.9, top_p=0.9, max_tokens=30, ignore_eos=True)
        for i in range(len(NAMES))
    ]
    with engine() as served:
        alone = [run(served, [p], [m], q)[0] for p, q, m in zip(prompts, params, NAMES, strict=True)]
    with engine(num_pages=40) as served:
        assert run(served, prompts, NAMES, params) == alone
        assert served.stats().num_preemptions > 0


def test_logprobs_are_those_of_the_merged_model() -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True)
    with engine() as served:
        (completion,) = served.generate([[1, 2, 3]], params, ["a"])
    assert [entry.top[0][0] for entry in completion.logprobs] == list(completion.token_ids)
    assert all(entry.sampled == entry.top[0][1] > entry.top[1][1] for entry in completion.logprobs)


def test_a_stop_string_ends_the_text() -> None:
    with engine() as served:
        (whole,) = served.generate([[1, 2, 3]], GREEDY, ["a"])
        stop = whole.text[4:6]
        (cut,) = served.generate(
            [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=12, stop=(stop,), ignore_eos=True), ["a"]
        )
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_a_cancelled_request_gives_its_pages_back_and_harms_nobody() -> None:
    with engine() as served:
        kept = served.submit(PROMPTS[2], GREEDY, MIXTURES[2])
        gone = served.submit(PROMPTS[6], GREEDY, MIXTURES[6])
        outputs = []
        while served.stats().num_running < 2:
            outputs += served.step()
        served.cancel(gone)
        served.cancel("no such request")
        outputs += served.step()
        assert [(o.request_id, o.event.state) for o in outputs if o.event] == [
            (gone, RequestState.CANCELLED)
        ]
        first = tuple(token for o in outputs if o.request_id == kept for token in o.token_ids)
        assert first + drain(served)[kept, 0] == WANTED[2]
        assert served.stats().pool_bytes.kv_in_use == 0


def test_completions_come_as_soon_as_they_and_all_before_them_have_ended() -> None:
    lengths, mixtures = (2, 40, 3), ["a", None, "b"]
    each = [replace(GREEDY, max_tokens=length) for length in lengths]
    with engine() as served:
        whole = [c.token_ids for c in served.generate(PROMPTS[:3], each, mixtures)]
        assert [len(tokens) for tokens in whole] == list(lengths)
        completions = served.completions(PROMPTS[:3], each, mixtures)
        assert next(completions).token_ids == whole[0]
        assert served.stats().num_running == 2, "the others go on when they are asked for"
        assert [c.token_ids for c in completions] == whole[1:]
        assert not served.has_work()
        left = served.completions(PROMPTS[:3], each, mixtures)
        assert next(left).token_ids == whole[0]
        left.close()
        served.step()
        assert not served.has_work(), "nobody reads the rest"


def test_adapter_clustering_bounds_the_distinct_adapters_of_a_step() -> None:
    names = ["a", "b", "c", "d", "e"] * 2
    prompts = [[i, i + 1] for i in range(10)]
    with engine() as served:
        served._scheduler._policy = AdapterClustering(max_distinct=2)
        ids = [served.submit(p, GREEDY, n) for p, n in zip(prompts, names, strict=True)]
        most = 0
        tokens: dict[str, tuple[int, ...]] = defaultdict(tuple)
        while served.has_work():
            for output in served.step():
                tokens[output.request_id] += output.token_ids
            most = max(most, served.stats().distinct_adapters_last_step)
    assert most == 2
    assert [tokens[i] for i in ids] == [expect(p, n) for p, n in zip(prompts, names, strict=True)]


class SlowLibrary(Library):
    """Loads of one name wait until they are let through."""

    def __init__(self, slow: str) -> None:
        super().__init__()
        self.slow = slow
        self.gate = threading.Event()

    def load(self, name_or_ref: str | AdapterRef, *, checked: bool = True) -> Adapter:
        assert isinstance(name_or_ref, AdapterRef)
        if name_or_ref.name == self.slow:
            assert self.gate.wait(30)
        return super().load(name_or_ref, checked=checked)


def test_an_adapter_on_its_way_delays_nobody_else() -> None:
    source = SlowLibrary("a")
    for name in ("a", "b"):
        source.add(name, adapters()[name])
    with engine(source=source) as served:
        late = served.submit([1, 2, 3], GREEDY, {"a": 1.0, "b": 0.5})
        quick = served.submit([1, 2, 3], GREEDY, "b")
        tokens: dict[str, tuple[int, ...]] = defaultdict(tuple)
        while len(tokens[quick]) < 12:
            for output in served.step():
                tokens[output.request_id] += output.token_ids
        assert tokens[late] == ()
        source.gate.set()
        assert drain(served)[late, 0] == expect([1, 2, 3], {"a": 1.0, "b": 0.5})
    assert tokens[quick] == expect([1, 2, 3], "b")


def test_requests_that_cannot_be_served_are_refused_when_they_come() -> None:
    with engine(num_pages=40) as served:
        with pytest.raises(RequestError, match="prompt is empty"):
            served.submit([], GREEDY)
        with pytest.raises(RequestError, match="no id of the vocabulary, 0 to 256"):
            served.submit([1, 257], GREEDY)
        with pytest.raises(AdapterNotFoundError, match="nobody"):
            served.submit([1], GREEDY, "nobody")
        with pytest.raises(RequestError, match="context"):
            served.submit([1] * CONFIG.max_position, GREEDY)
        with pytest.raises(CapacityError, match="whole pool has 40 pages"):
            served.submit([1] * 150, GREEDY)
        with pytest.raises(RequestError, match="twice"):
            served.submit([1], GREEDY, [("a", 1.0), ("a", 0.5)])
        served.submit([1], GREEDY, request_id="mine")
        with pytest.raises(RequestError, match="ids must differ"):
            served.submit([2], GREEDY, request_id="mine")
        completions = served.generate([PROMPTS[1], [], PROMPTS[2]], GREEDY, [MIXTURES[1], "a", MIXTURES[2]])
        of_each = served.generate([[], [1]], SamplingParams(n=3, max_tokens=1))
    assert [(c.index, c.error is None) for c in of_each] == [
        (i, fine) for fine in (False, True) for i in range(3)
    ]
    assert [c.finish_reason for c in completions] == ["length", "failed", "length"]
    assert isinstance(completions[1].error, RequestError)
    assert (completions[0].token_ids, completions[2].token_ids) == (WANTED[1], WANTED[2])


def test_a_prompt_that_the_tokenizer_refuses_fails_alone() -> None:
    no_content, number = [{"role": "user"}], [{"role": "user", "content": 5}]
    prompts: list[Any] = [PROMPTS[1], no_content, number, "half of a character: \ud83d", PROMPTS[2]]
    with engine() as served:
        completions = served.generate(prompts, GREEDY, [MIXTURES[1], "a", "a", "a", MIXTURES[2]])
    for refused, who in zip(completions[1:4], ("chat template", "chat template", "tokenizer"), strict=True):
        assert isinstance(refused.error, RequestError)
        assert f"the model's {who} refuses the prompt: " in str(refused.error)
    assert (completions[0].token_ids, completions[4].token_ids) == (WANTED[1], WANTED[2])


def test_a_model_without_a_chat_template_takes_no_messages() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with Engine(tiny_model(CONFIG), tokenizer, library()) as served:
        with pytest.raises(RequestError, match=r"no chat template, .* as plain text .*--raw"):
            served.submit([{"role": "user", "content": "hello"}], GREEDY)
        (answer,) = served.generate(["hello"], GREEDY)
    assert answer.error is None


def test_an_adapter_that_drives_logits_to_infinity_fails_alone() -> None:
    source = library()
    source.add("huge", tiny_adapter(CONFIG, rank=2, seed=9))
    with engine(source=source, dtype="float32") as served:
        bad, good = served.generate([[1, 2, 3], [1, 2, 3]], GREEDY, [{"huge": 1e38}, "a"])
    assert isinstance(bad.error, AdapterError)
    assert "huge" in str(bad.error)
    # The tokens of the tiny model hang on no rounding.
    assert good.token_ids == expect([1, 2, 3], "a")


def drain(served: Engine) -> dict[tuple[str, int], tuple[int, ...]]:
    """Step to the end; tokens by sample. Exactly one terminal event each."""
    tokens: dict[tuple[str, int], tuple[int, ...]] = defaultdict(tuple)
    ended: list[tuple[str, int]] = []
    while served.has_work():
        for output in served.step():
            assert isinstance(output, Output)
            key = (output.request_id, output.index)
            assert key not in ended
            tokens[key] += output.token_ids
            if output.event is not None:
                ended.append(key)
    return tokens


def test_generate_bears_requests_that_other_threads_submit_meanwhile() -> None:
    """It looked through the queue of submitted requests, which must not grow while somebody does."""
    with engine() as served:

        class GrowsWhileRead(deque[LiveSequence]):
            def __iter__(self) -> Iterator[LiveSequence]:
                for live in super().__iter__():
                    served.submit([1, 2, 3], GREEDY)
                    yield live

        served._submitted = GrowsWhileRead()
        assert run(served, PROMPTS[:2], MIXTURES[:2]) == WANTED[:2]
