"""The engine behind its pipe answers as the engine itself does, sleeps when idle, and lets nobody hold up another."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from manylora.lora.formats import save_peft
from manylora.lora.library import Library
from manylora.lora.patience import MAX_LATE
from manylora.models.tiny import tiny_adapter, tiny_config
from manylora.server import adapter_calls, engine_process
from manylora.server.adapter_calls import AdapterCalls
from manylora.server.channel import ChannelClosed
from manylora.server.engine_client import EngineClient, EngineError
from manylora.server.engine_process import CALL_THREADS, INTAKE_THREADS, EngineProcess
from manylora.server.messages import UNAVAILABLE, Step
from manylora.text import Engine, SamplingParams
from tests.lora.remote_servers import FolderServer
from tests.lora.remote_servers import serving as serving_folder
from tests.server.engines import gather, run, serving, tokens_of
from tests.text.engines import CONFIG, engine, library

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
LONG = {**GREEDY, "max_tokens": 300}
PROMPT = list(b"the same prompt")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """Steps of a tiny model: a second thread is waited for, not used."""


async def until(holds: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


def counted(one: Engine) -> list[float]:
    """When each step of the engine began, from now on."""
    times: list[float] = []
    step = one.step

    def stepping() -> list:  # type: ignore[type-arg]
        times.append(time.monotonic())
        return step()

    one.step = stepping  # type: ignore[method-assign]
    return times


def test_answers_are_the_engines_own() -> None:
    mixtures = [(), (("a", 1.0),), (("a", 0.5), ("b", -1.0)), (("c", 2.0),)] * 2
    params = [{**GREEDY, "n": 1 + i % 2, "seed": i, "temperature": i % 3} for i in range(len(mixtures))]
    with engine() as offline:
        completions = offline.generate(
            [PROMPT] * len(mixtures), [SamplingParams.from_dict(one) for one in params], mixtures
        )
    want = [completion.token_ids for completion in completions]
    assert len(set(want)) > 6  # mixtures and seeds change the answer

    async def test() -> list[tuple[int, ...]]:
        async with serving(engine(), library()) as client:
            streams = await asyncio.gather(
                *(
                    client.submit(f"request {i}", PROMPT, one, mixture)
                    for i, (one, mixture) in enumerate(zip(params, mixtures, strict=True))
                )
            )
            answers = await asyncio.gather(*map(gather, streams))
            assert all(chunks[-1].finish_reason == "length" for one in answers for chunks in one.values())
            assert all(
                chunks[0].num_prompt_tokens == len(PROMPT) for one in answers for chunks in one.values()
            )
            return [tokens_of(chunks) for one in answers for _, chunks in sorted(one.items())]

    assert run(test()) == want


def test_what_a_step_brings_is_one_frame() -> None:
    frames: list[Step] = []

    async def test(one: Engine) -> None:
        async with serving(one, library()) as client:
            take = client._take

            def taking(step: Step) -> None:
                frames.append(step)
                take(step)

            client._take = taking  # type: ignore[method-assign]
            await asyncio.gather(*[answer(client, f"request {i}") for i in range(6)])

    one = engine()
    steps = counted(one)
    run(test(one))
    together = [len(frame.chunks) for frame in frames if frame.chunks]
    assert max(together) == 6
    assert len(together) <= len(steps)


async def answer(client: EngineClient, request_id: str, mixture: str = "a") -> str:
    chunks = await gather(await client.submit(request_id, PROMPT, GREEDY, [(mixture, 1.0)]))
    return str(chunks[0][-1].finish_reason)


def test_an_idle_engine_sleeps_and_a_request_wakes_it() -> None:
    async def test(one: Engine) -> None:
        async with serving(one, library()) as client:
            assert await answer(client, "first") == "length"
            await asyncio.sleep(0.1)
            steps = counted(one)
            await asyncio.sleep(0.5)
            assert not steps
            asked = time.monotonic()
            assert await answer(client, "second") == "length"
            assert (
                steps[0] - asked < 0.2
            )  # far less than any polling interval that would be worth its power

    run(test(engine()))


def test_statistics_come_with_the_steps_and_when_work_ends() -> None:
    async def test(one: Engine) -> None:
        async with serving(one, library()) as client:
            before = client.stats
            await answer(client, "id")
            await until(lambda: client.stats.num_running == 0 and client.stats.num_steps > before.num_steps)
            assert client.stats.num_output_tokens == before.num_output_tokens + 8
            assert client.stats == one.stats()

    run(test(engine()))


REFUSALS: dict[str, tuple[list[int], dict[str, Any], list[tuple[str, float]], str, str]] = {
    "unknown adapter": (PROMPT, GREEDY, [("nobody", 1.0)], "AdapterNotFoundError", "nobody"),
    "empty prompt": ([], GREEDY, [], "RequestError", "empty"),
    "unknown option": (PROMPT, {"frobnicate": 1}, [], "RequestError", "frobnicate"),
    "too long": (PROMPT, {"max_tokens": 10_000}, [], "RequestError", "context"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_who_is_refused_learns_why_and_nobody_else_minds(name: str) -> None:
    prompt, params, mixture, kind, says = REFUSALS[name]

    async def test() -> None:
        async with serving(engine(), library()) as client:
            with pytest.raises(EngineError, match=says) as refused:
                await client.submit("id", prompt, params, mixture)
            assert refused.value.kind == kind
            assert await answer(client, "id") == "length"  # the id is free again

    run(test())


def test_several_prompts_are_accepted_or_refused_as_a_whole() -> None:
    async def test(one: Engine) -> None:
        async with serving(one, library()) as client:
            for prompts in ({"x": PROMPT, "y": []}, {"x": PROMPT, "y": PROMPT, "z": PROMPT}):
                with pytest.raises(EngineError, match=r"empty|3 samples are more than the 2"):
                    await client.submit_all(prompts, GREEDY, [("a", 1.0)])
                await until(lambda: not client._streams)
                assert not one.has_work()
            assert one.stats().num_output_tokens == 0
            streams = await client.submit_all({"x": PROMPT, "y": PROMPT[:3]}, GREEDY, [("a", 1.0)])
            answers = [tokens_of((await gather(stream))[0]) for stream in streams]
            assert [len(tokens) for tokens in answers] == [8, 8]
            assert answers[0] != answers[1]

    run(test(engine(max_waiting=2)))


def test_an_unforeseen_error_is_answered_and_told_to_the_log_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(one: Engine) -> EngineError:
        async with serving(one, library()) as client:
            with pytest.raises(EngineError) as refused:
                await client.submit("id", PROMPT, GREEDY, [])
            return refused.value

    def fail(*_: object, **__: object) -> NoReturn:
        raise KeyError("the secret")

    one = engine()
    monkeypatch.setattr(one, "submit_all", fail)
    error = run(test(one))
    assert error.kind == "KeyError"
    assert "secret" not in str(error)
    assert "request id: 'the secret'" in caplog.text


def test_a_request_that_is_left_frees_its_pages_within_a_step() -> None:
    async def test(one: Engine) -> None:
        async with serving(one, library()) as client:
            async with await client.submit("id", PROMPT, LONG, [("a", 1.0)]) as stream:
                await anext(stream)
                assert one.stats().num_running == 1
                steps = counted(one)
            await until(lambda: one.stats().num_running == 0)
            # One step may be under way when the word comes; the next one frees the pages.
            assert len(steps) <= 2 + STEPS_BEFORE_THE_WORD_COMES
            assert one.stats().pool_bytes.kv_in_use == 0
            await until(lambda: not client._streams)

    run(test(engine(prefix_caching=False)))


STEPS_BEFORE_THE_WORD_COMES = 20
"""Steps of the tiny model are shorter than it takes two threads to hand a message on. 300 would be the whole answer."""


def test_who_leaves_before_being_accepted_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    names, may_find = library(), threading.Event()
    locate = names.locate
    monkeypatch.setattr(names, "locate", lambda name: may_find.wait() and locate(name))

    async def test(one: Engine) -> None:
        async with serving(one, names) as client:
            asking = asyncio.create_task(client.submit("id", PROMPT, LONG, [("a", 1.0)]))
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert asking.cancelled()
            await asyncio.sleep(0.05)
            may_find.set()
            await until(lambda: not client._streams)
            assert not one.has_work()
            assert one.stats().num_output_tokens < 300

    run(test(engine(source=names)))


def test_a_root_that_is_slow_to_answer_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    names, may_find = library(), threading.Event()
    locate = names.locate
    monkeypatch.setattr(names, "locate", lambda name: (name != "e" or may_find.wait()) and locate(name))

    async def test(one: Engine) -> None:
        async with serving(one, names) as client:
            slow = asyncio.create_task(answer(client, "slow", "e"))
            pin = asyncio.create_task(client.pin("e"))
            await asyncio.sleep(0.05)
            assert await answer(client, "quick", "b") == "length"
            assert await client.names() == ["a", "b", "c", "d", "e"]
            assert not slow.done()
            assert not pin.done()
            may_find.set()
            assert await slow == "length"
            await pin

    run(test(engine(source=names)))


def test_a_slow_reader_loses_its_request_and_the_others_do_not_wait() -> None:
    async def test(one: Engine) -> None:
        async with serving(one, library(), max_backlog=16) as client:
            unread = await client.submit("unread", PROMPT, LONG, [])
            answers = await asyncio.gather(*[answer(client, f"request {i}") for i in range(4)])
            assert answers == ["length"] * 4
            await until(lambda: not client._streams)
            assert one.stats().num_output_tokens < 300
            ((last,),) = (await gather(unread)).values()
            assert last.error is not None
            assert "unread" in last.error.message

    run(test(engine()))


# -- the end


def test_a_drain_lets_requests_end_and_takes_no_new_ones() -> None:
    async def test() -> None:
        async with serving(engine(), library()) as client:
            stream = await client.submit("id", PROMPT, {**GREEDY, "max_tokens": 40}, [])
            draining = asyncio.create_task(client.drain(60))
            await asyncio.sleep(0)
            with pytest.raises(EngineError) as refused:
                await client.submit("late", PROMPT, GREEDY, [])
            assert refused.value.kind == UNAVAILABLE
            assert not draining.done()
            assert len(tokens_of((await gather(stream))[0])) == 40
            await draining

    run(test())


def test_a_drain_cancels_what_takes_too_long() -> None:
    async def test(one: Engine) -> None:
        async with serving(one, library()) as client:
            stream = await client.submit("id", PROMPT, LONG, [])
            await client.drain(0.05)
            chunks = (await gather(stream))[0]
            assert chunks[-1].finish_reason == "cancelled"
            assert 0 < len(tokens_of(chunks)) < 300

    run(test(engine()))


def test_an_engine_that_dies_fails_what_is_under_way_and_what_comes_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(one: Engine) -> None:
        async with serving(one, library()) as client:
            stream = await client.submit("id", PROMPT, LONG, [])
            await anext(stream)
            assert not client.closed.is_set()

            def crash() -> NoReturn:
                raise RuntimeError("out of order")

            monkeypatch.setattr(one, "step", crash)
            last = (await gather(stream))[0][-1]
            assert last.error is not None
            assert last.error.kind == UNAVAILABLE
            await asyncio.wait_for(client.closed.wait(), 10)
            assert not client.is_alive
            for late in (client.submit("late", PROMPT, GREEDY, []), client.names()):
                with pytest.raises(EngineError) as gone:
                    await late
                assert gone.value.kind == UNAVAILABLE

    with pytest.raises(RuntimeError, match="out of order"):
        run(test(engine()))


@pytest.mark.parametrize("is_busy", [False, True])
def test_the_engine_ends_when_its_pipe_closes(is_busy: bool) -> None:
    async def test(one: Engine) -> None:
        async with serving(one, library()) as client:  # asserts that the engine's thread has ended
            if is_busy:
                stream = await client.submit("id", PROMPT, LONG, [])
                await anext(stream)
            await client.close()
            assert one.has_work() == is_busy

    run(test(engine()))


# -- adapters


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("alice", "team/bob"), 1):
        save_peft(tiny_adapter(CONFIG, seed=seed, dtype=torch.bfloat16), tmp_path / "root" / name)
    save_peft(tiny_adapter(CONFIG, seed=9), tmp_path / "outside")
    save_peft(tiny_adapter(tiny_config(hidden_size=32), seed=3), tmp_path / "root" / "other-model")
    (tmp_path / "root" / "broken.safetensors").write_bytes(b"not a safetensors file")
    shutil.copytree(tmp_path / "root" / "alice", tmp_path / "root" / "no-unicode")
    config = tmp_path / "root" / "no-unicode" / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"\\ud800": 1,', 1))
    return tmp_path / "root"


def test_a_name_is_loaded_pinned_pointed_anew_and_unloaded(root: Path) -> None:
    names = Library(root)

    async def tokens(client: EngineClient, name: str) -> tuple[int, ...]:
        return tokens_of((await gather(await client.submit("id", PROMPT, GREEDY, [(name, 1.0)])))[0])

    async def test(one: Engine) -> None:
        async with serving(one, names, [str(root)]) as client:
            alice, bob = await tokens(client, "alice"), await tokens(client, "team/bob")
            assert alice != bob
            info = await client.load_adapter("new", "alice")
            assert (info["resident"], info["pinned"], info["kind"]) == (True, False, "folder")
            assert await tokens(client, "new") == alice
            await client.load_adapter("new", "team/bob")
            assert await tokens(client, "new") == bob
            await client.pin("new")
            assert [one["names"] for one in await client.residency() if one["is_pinned"]] == [
                ["new", "team/bob"]
            ]
            await client.unpin("new")
            await until(lambda: not any(one.is_pinned for one in one.residency()))
            assert await client.names() == [
                "alice",
                "broken",
                "new",
                "no-unicode",
                "other-model",
                "team/bob",
            ]
            freed = await client.unload_adapter("alice")
            assert freed > 0
            assert "alice" not in await client.names()
            with pytest.raises(EngineError, match="alice"):
                await tokens(client, "alice")
            await client.load_adapter("alice")  # what the roots hold under the name
            assert await tokens(client, "alice") == alice

    run(test(engine(source=names)))


def test_no_more_adapters_are_loaded_than_may_be(root: Path) -> None:
    names = Library(root)

    async def test(one: Engine) -> None:
        async with serving(one, names, [str(root)], max_loaded=2) as client:
            for _ in range(2):  # what is no adapter, and what is loaded again, counts for nothing
                with pytest.raises(EngineError, match="broken"):
                    await client.load_adapter("third", "broken")
                await client.load_adapter("first", "alice")
            await client.load_adapter("second", "alice")
            with pytest.raises(
                EngineError, match=r"2 adapters are loaded.*max_loaded_adapters.*unload"
            ) as full:
                await client.load_adapter("third", "alice")
            assert full.value.kind == "RequestError"
            assert "third" not in await client.names()
            await client.load_adapter("second", "team/bob")
            assert (
                await answer(client, "id", "alice") == "length"
            )  # below a root, so that it needs no loading
            await client.unload_adapter("first")
            await client.load_adapter("third", "alice")
            for name in ("second", "third"):
                await client.unload_adapter(name)
            assert not names._pointed, "names that came and went leave nothing behind"

    run(test(engine(source=names)))


BAD_PATHS = {
    "absolute": ("/etc/passwd", "RequestError"),
    "a URL": ("s3://bucket/adapter", "RequestError"),
    "above the root": ("../outside", "AdapterNotFoundError"),
    "nothing there": ("carol", "AdapterNotFoundError"),
    "no adapter": ("broken", "AdapterFormatError"),
    "another model's": ("other-model", "AdapterMismatchError"),
    "a NUL": ("te\0am/alice", "AdapterNotFoundError"),
    "a lone surrogate": ("no-unicode", "AdapterFormatError"),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_what_cannot_be_loaded_changes_nothing(case: str, root: Path) -> None:
    path, kind = BAD_PATHS[case]
    assert (root.parent / "outside" / "adapter_config.json").is_file()
    names = Library(root)

    async def test(one: Engine) -> None:
        async with serving(one, names, [str(root)]) as client:
            before = await client.adapter_info("alice")
            with pytest.raises(EngineError) as refused:
                await client.load_adapter("alice", path)
            assert refused.value.kind == kind
            assert (case == "no adapter") == ("broken.safetensors" in str(refused.value))
            assert str(root.parent) not in str(refused.value), "where the roots lie is told to nobody"
            assert await client.adapter_info("alice") == before

    run(test(engine(source=names)))


def test_a_root_that_is_down_costs_its_own_names_alone_and_is_told_to_no_client(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adapter_calls, "LISTING_AGE_S", 0.0)
    save_peft(tiny_adapter(CONFIG, seed=7), tmp_path / "remote" / "far")
    here = ["alice", "broken", "no-unicode", "other-model", "team/bob"]

    async def test(one: Engine, names: Library, url: str) -> None:
        async with serving(one, names, [str(root), url]) as client:

            async def refused(kind: str) -> None:
                for asked in (
                    client.submit("id", PROMPT, GREEDY, [("nobody", 1.0)]),
                    client.adapter_info("nobody"),
                    client.pin("nobody"),
                    client.load_adapter("new", "nobody"),
                ):
                    with pytest.raises(EngineError) as error:
                        await asked
                    assert error.value.kind == kind
                    assert "127.0.0.1" not in str(error.value)

            await refused("AdapterNotFoundError")
            remote.status = 500
            assert await client.names() == here
            assert f"'{url}' could not list its names" in caplog.text
            await refused("AdapterUnavailableError")
            assert f"'{url}' could not say whether it holds 'nobody'" in caplog.text
            remote.status = None
            assert await client.names() == sorted([*here, "far"])
            remote.status = 500
            assert await client.names() == sorted([*here, "far"]), "as it was when it last answered"

    remote = FolderServer(tmp_path / "remote")
    with serving_folder(remote) as url:
        names = Library(root, url, cache_dir=tmp_path / "cache")
        run(test(engine(source=names), names, url))


def test_a_root_that_hangs_does_not_fill_the_intake(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Library(root, "memory://hangs", cache_dir=tmp_path / "cache", resolve_timeout_s=1.0)
    may_answer = threading.Event()
    monkeypatch.setattr(names._listings[1].source, "_ask", lambda *_: may_answer.wait() and None)

    async def test(one: Engine) -> None:
        async with serving(one, names) as client:

            async def kind_of_refusal(request_id: str) -> str:
                with pytest.raises(EngineError) as refused:
                    await client.submit(request_id, PROMPT, GREEDY, [("nobody", 1.0)])
                return refused.value.kind

            hanging = [
                asyncio.create_task(kind_of_refusal(f"request {i}")) for i in range(3 * INTAKE_THREADS)
            ]
            await asyncio.sleep(0)
            of_base = await client.submit("base", PROMPT, GREEDY, [])
            assert not hanging[0].done()
            assert len((await gather(of_base))[0]) > 0
            assert await answer(client, "local", "alice") == "length"
            assert set(await asyncio.gather(*hanging)) == {"AdapterUnavailableError"}
            asides = [thread for thread in threading.enumerate() if thread.name == "aside"]
            assert MAX_LATE <= len(asides) < 2 * INTAKE_THREADS, "not all were asked"
            may_answer.set()
            await until(lambda: not any(thread.is_alive() for thread in asides))
            assert await kind_of_refusal("again") == "AdapterNotFoundError"

    run(test(engine(source=names)))


def test_a_root_that_hangs_is_not_waited_for_by_a_listing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, may_answer = Library(root), threading.Event()
    source = names._listings[0].source
    real = source.names
    monkeypatch.setattr(adapter_calls, "LISTING_AGE_S", 0.0)
    monkeypatch.setattr(adapter_calls, "LISTING_WAIT_S", 0.05)

    async def test(one: Engine) -> None:
        async with serving(one, names) as client:
            known = await client.names()
            assert "alice" in known
            (root / "broken.safetensors").rename(root / "late.safetensors")
            monkeypatch.setattr(source, "names", lambda: may_answer.wait() and real())
            assert await client.names() == known
            may_answer.set()
            await until(lambda: "late" in names.known_names())
            assert "late" in await client.names()

    run(test(engine(source=names)))


def test_of_those_who_ask_for_names_one_at_most_waits_for_a_root(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a root that hangs would take every thread that answers calls."""
    names, may_answer = Library(root), threading.Event()
    source = names._listings[0].source
    real = source.names
    monkeypatch.setattr(adapter_calls, "LISTING_AGE_S", 0.0)

    async def test(one: Engine) -> None:
        async with serving(one, names) as client:
            known = await client.names()
            monkeypatch.setattr(source, "names", lambda: may_answer.wait() and real())
            waiting = asyncio.create_task(client.names())
            await until(
                lambda: names._listings[0]._anew is not None and not names._listings[0]._anew.done()
            )
            for _ in range(2 * CALL_THREADS):
                assert await client.names() == known
            assert (await client.adapter_info("alice"))["name"] == "alice"
            assert not waiting.done()
            may_answer.set()
            assert await waiting == known

    run(test(engine(source=names)))


def test_an_answer_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names, may_answer = library(), threading.Event()
    one = engine(source=names)
    monkeypatch.setattr(names, "known_names", lambda: may_answer.wait() and [])

    async def test(one: Engine) -> None:
        async with serving(one, names) as client:
            client._call_timeout_s = 0.1
            with pytest.raises(EngineError, match=r"0\.1 s") as late:
                await client.names()
            assert late.value.kind == UNAVAILABLE
            may_answer.set()
            client._call_timeout_s = 30
            assert await client.names() == []

    run(test(one))


class Pipe:
    """A channel whose frames meet `send`, and by which nothing comes until it is closed."""

    def __init__(self, send: Callable[[Step], None]) -> None:
        self.send = send
        self.closed = threading.Event()

    def receive(self) -> NoReturn:
        self.closed.wait()
        raise ChannelClosed


def process_of(engine: Engine, pipe: Pipe) -> EngineProcess:
    return EngineProcess(engine, AdapterCalls(engine, library(), (), 1), pipe)  # type: ignore[arg-type]


def test_a_frame_that_cannot_be_made_ends_the_process_with_its_reason() -> None:
    def refuse(step: Step) -> None:
        raise TypeError("no frame holds this")

    pipe = Pipe(refuse)
    with engine() as served, pytest.raises(TypeError, match="no frame holds this"):
        process_of(served, pipe).run()
    pipe.closed.set()


def test_a_receiver_that_stalls_does_not_keep_a_failure_from_being_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_process, "FLUSH_S", 0.1)
    stalled, released = threading.Event(), threading.Event()

    def stall(step: Step) -> None:
        stalled.set()
        released.wait()

    def crash() -> NoReturn:
        stalled.wait()
        raise IndexError("a crash")

    pipe = Pipe(stall)
    with engine() as served:
        monkeypatch.setattr(served, "step", crash)
        process = process_of(served, pipe)
        process._steps.put(Step())  # which the sender takes, and stalls over
        with pytest.raises(IndexError, match="a crash"):
            process.run()
    pipe.closed.set()
    released.set()
