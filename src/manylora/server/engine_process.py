"""The engine process: `python -m manylora.server.engine_process FD`, where FD is its end of the pipe.

Three kinds of threads. The main one steps the engine, and alone writes to the pipe: one frame for each step. One reads
the pipe and never waits for anything else. Those of two pools accept requests and answer calls, and may wait for disks
and networks; what they have to say goes with the next frame. With nothing to do, the main thread sleeps until woken.

When the pipe closes, the process ends: its parent has died, or wants it to end. It hears no signal but SIGKILL.
"""

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Full, Queue
from typing import Any

import msgspec

from manylora.errors import AdapterUnavailableError, ManyLoraError
from manylora.lifecycle import RequestState
from manylora.lora.library import Library
from manylora.models.loading import load_model
from manylora.models.tokenizer import load_tokenizer
from manylora.server.adapter_calls import CALLS, AdapterCalls
from manylora.server.channel import Channel, ChannelClosed
from manylora.server.logs import configure_logs
from manylora.server.messages import (
    Call,
    Cancel,
    Chunk,
    EngineSetup,
    ErrorInfo,
    ModelInfo,
    Ready,
    Refused,
    Reply,
    StartFailed,
    Step,
    Submit,
    ToEngine,
    TokenLogprobs,
)
from manylora.server.tokenizer import describe_tokenizer
from manylora.text.engine import Engine
from manylora.text.output import Output
from manylora.text.params import SamplingParams
from manylora.text.policies import make_policy

STATS_INTERVAL_S = 0.25
"""Least time between two statistics while the engine is busy."""

INTAKE_THREADS = 32
"""Requests being accepted at a time. Most take no time; those that name adapters of a root that is slow to answer shall
not hold up the others."""

BASE_INTAKE_THREADS = 4
"""Of requests for the base alone, which need no root, beside those."""

CALL_THREADS = 2
"""Calls being worked on at a time."""

MAX_UNSENT = 16
"""Steps whose outputs wait to be sent."""

FLUSH_S = 5.0
"""Longest that the end waits for them."""

NOT_NOW = (
    "an adapter cannot be had now: its root does not answer, its files cannot be read, or what is sent cannot be "
    "stored; ask again later, or see the server's log for the cause"
)
"""What clients are told of an AdapterUnavailableError."""

log = logging.getLogger("manylora.engine")


class EngineProcess:
    """Runs one engine for one pipe."""

    def __init__(
        self, engine: Engine, calls: AdapterCalls, channel: Channel[ToEngine], prefixes: Iterable[str] = ()
    ) -> None:
        """prefixes: the library's; where its roots lie is not for clients to know."""
        self._engine = engine
        # The longer first, should one lie inside another.
        self._prefixes = tuple(sorted(prefixes, key=len, reverse=True))
        self._calls = calls
        self._channel = channel
        # Set whenever there is something that the main thread does not know of yet.
        self._wake = threading.Event()
        self._is_closed = False
        self._answers: deque[str | Refused | Reply] = deque()  # a str: the id of an accepted request
        self._steps: Queue[Step | None] = Queue(MAX_UNSENT)  # None: no more come
        self._unsendable: Exception | None = None
        """Why a step's outputs could not be made a frame."""
        self._accepting: dict[str, Future[None]] = {}
        self._intake = ThreadPoolExecutor(INTAKE_THREADS, "intake")
        self._base_intake = ThreadPoolExecutor(BASE_INTAKE_THREADS, "base-intake")
        self._callers = ThreadPoolExecutor(CALL_THREADS, "call")
        self._stats_sent = -STATS_INTERVAL_S

    def run(self) -> None:
        """Serve until the pipe closes."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        sender = threading.Thread(target=self._send_steps, name="sender", daemon=True)
        sender.start()
        try:
            while not self._is_closed:
                # Cleared before looking for work: what comes from now on wakes the thread, or is seen by the step.
                self._wake.clear()
                outputs = self._engine.step()
                is_idle = not self._engine.has_work()
                self._report(outputs, is_idle)
                if is_idle and not self._answers:
                    self._wake.wait()
        finally:
            # Not for ever: a receiver that stalls must not keep a failure from being told.
            with suppress(Full):
                self._steps.put(None, timeout=FLUSH_S)
                sender.join(FLUSH_S)
        if self._unsendable is not None:
            raise self._unsendable

    # -- the main thread

    def _report(self, outputs: list[Output], is_idle: bool) -> None:
        answers = [self._answers.popleft() for _ in range(len(self._answers))]
        now = time.monotonic()
        has_stats = is_idle or now - self._stats_sent >= STATS_INTERVAL_S
        if not (outputs or answers or has_stats):
            return
        if has_stats:
            self._stats_sent = now
        # Waits where so many are unsent: a reader that stalls stalls the engine.
        self._steps.put(self._step_of(outputs, answers, has_stats))

    def _step_of(
        self, outputs: list[Output], answers: list[str | Refused | Reply], has_stats: bool
    ) -> Step:
        return Step(
            accepted=tuple(one for one in answers if isinstance(one, str)),
            refused=tuple(one for one in answers if isinstance(one, Refused)),
            replies=tuple(one for one in answers if isinstance(one, Reply)),
            chunks=tuple(map(self._chunk_of, outputs)),
            stats=self._engine.stats() if has_stats else None,
        )

    def _chunk_of(self, output: Output) -> Chunk:
        """An output as it is sent."""
        event, finish_reason, error = output.event, None, None
        if event is not None and event.state is RequestState.FAILED:
            assert event.error is not None
            error = self._told(event.error, f"request {output.request_id}")
        elif event is not None:
            finish_reason = str(event.reason or event.state)
        return Chunk(
            request_id=output.request_id,
            index=output.index,
            text=output.text,
            token_ids=output.token_ids,
            logprobs=tuple(TokenLogprobs(one.sampled, one.top) for one in output.logprobs),
            finish_reason=finish_reason,
            error=error,
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
        )

    def _told(self, error: BaseException, what: str) -> ErrorInfo:
        """What a client may know of an error: paths and URLs are told from the library's roots on, and what went
        wrong with a root is for the log."""
        if isinstance(error, AdapterUnavailableError):
            log.warning("%s: %s", what, error)
            return ErrorInfo(type(error).__name__, NOT_NOW)
        info = error_info(error, what)
        message = info.message
        for prefix in self._prefixes:
            message = message.replace(prefix, "")
            if "://" in prefix.rstrip("/"):
                message = message.replace(prefix.rstrip("/"), "a remote root")
        return msgspec.structs.replace(info, message=message)

    # -- the sender's thread: the system may give the processor to who receives a frame before `send` returns

    def _send_steps(self) -> None:
        for step in iter(self._steps.get, None):
            if self._is_closed:
                continue  # whoever puts more must not wait: it will see that all is over
            try:
                self._channel.send(step)
            except Exception as error:
                self._unsendable = None if isinstance(error, ChannelClosed) else error
                self._is_closed = True
                self._wake.set()

    # -- the reader's thread

    def _read(self) -> None:
        try:
            while True:
                self._take(self._channel.receive())
        except ChannelClosed:
            pass
        finally:  # whatever happened: an engine that hears nothing must not go on
            self._is_closed = True
            self._wake.set()

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit(prompts=prompts):
                intake = self._intake if message.mixture else self._base_intake
                accepting = intake.submit(self._submit, message)
                ids = [request_id for request_id, _ in prompts]
                self._accepting |= dict.fromkeys(ids, accepting)
                accepting.add_done_callback(lambda _: [self._accepting.pop(one) for one in ids])
            case Cancel(request_id=request_id):
                pending = self._accepting.get(request_id)
                if pending is None:
                    self._cancel(request_id)
                else:  # the engine does not know it yet
                    pending.add_done_callback(lambda _: self._cancel(request_id))
            case Call():
                self._callers.submit(self._call, message)
            case _:
                raise AssertionError(f"an engine is set up once, got {message}")

    def _cancel(self, request_id: str) -> None:
        self._engine.cancel(request_id)
        self._wake.set()

    # -- threads of the pools

    def _submit(self, message: Submit) -> None:
        ids = [request_id for request_id, _ in message.prompts]
        try:
            self._engine.submit_all(
                [tokens for _, tokens in message.prompts],
                SamplingParams.from_dict(message.params),
                message.mixture,
                request_ids=ids,
                tenant=message.tenant,
                deadline_s=message.deadline_s,
            )
        except Exception as error:  # whatever it is, whoever asked gets an answer
            told = self._told(error, f"request {ids[0]}")
            for request_id in ids:
                self._answer(Refused(request_id, told))
        else:
            for request_id in ids:
                self._answer(request_id)

    def _call(self, message: Call) -> None:
        try:
            if message.method not in CALLS:
                raise AssertionError(f"no call '{message.method}'")
            result = getattr(self._calls, message.method)(**message.args)
        except Exception as error:
            self._reply(message, None, error)
            return
        if isinstance(result, Future):
            self._wake.set()  # it is the engine's thread that brings the result about
            result.add_done_callback(partial(self._reply_done, message))
        else:
            self._reply(message, result, None)

    def _reply_done(self, message: Call, done: "Future[Any]") -> None:
        error = done.exception()
        self._reply(message, None if error else done.result(), error)

    def _reply(self, message: Call, result: Any, error: BaseException | None) -> None:
        info = None if error is None else self._told(error, f"call {message.method}")
        self._answer(Reply(message.call_id, result, info))

    def _answer(self, answer: str | Refused | Reply) -> None:
        self._answers.append(answer)
        self._wake.set()


def error_info(error: BaseException, what: str) -> ErrorInfo:
    """What a client may know of an error; one that was not raised on purpose goes to the log instead."""
    if isinstance(error, ManyLoraError):
        # A file that an error quotes may hold lone surrogates, which no frame takes.
        told = str(error).encode("utf-8", "backslashreplace").decode()
        return ErrorInfo(type(error).__name__, told, getattr(error, "retry_after_s", None))
    log.error("%s: %s", what, error, exc_info=error)
    return ErrorInfo(type(error).__name__, "an error inside the engine; its log has the cause")


def build(setup: EngineSetup, channel: Channel[ToEngine]) -> tuple[EngineProcess, Ready]:
    """Build what the setup asks for, and what to say of it.

    Raises:
        ManyLoraError: something of the setup cannot be had.
    """
    # What is quickly refused comes first: loading the model takes longest.
    policy = make_policy(setup.policy, **setup.policy_options)
    library = Library(
        *setup.adapters,
        cache_dir=setup.cache_dir,
        max_cache_bytes=setup.max_cache_bytes,
        max_rank=setup.max_rank,
        max_bytes=setup.max_adapter_bytes,
        suggests=False,
        resolve_timeout_s=setup.resolve_timeout_s,
        fetch_timeout_s=setup.fetch_timeout_s,
    )
    tokenizer = load_tokenizer(setup.model)
    model = load_model(setup.model, dtype=setup.dtype, device=setup.device)
    engine = Engine(model, tokenizer, library, setup.engine, policy)
    engine.warm_up()
    info = ModelInfo(
        name=model.config.name,
        dtype=setup.dtype,
        vocab_size=model.config.vocab_size,
        max_position=model.config.max_position,
        eos_token_ids=model.config.eos_token_ids,
        pool_bytes=engine.num_pages * engine.layout.page_bytes,
        page_bytes=engine.layout.page_bytes,
        page_tokens=engine.layout.page_tokens,
    )
    ready = Ready(info, describe_tokenizer(tokenizer), engine.stats())
    calls = AdapterCalls(engine, library, setup.adapters, setup.max_loaded_adapters)
    return EngineProcess(engine, calls, channel, library.prefixes), ready


def main() -> int:
    """Run the process; returns its exit status."""
    # A service manager sends them to all processes of a service. What they mean is for the parent to say.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    channel: Channel[ToEngine] = Channel(socket.socket(fileno=int(sys.argv[1])), ToEngine)
    try:
        setup = channel.receive()
        assert isinstance(setup, EngineSetup)
        configure_logs(setup.log_format)
        process, ready = build(setup, channel)
        # What is there now lives as long as the process. Beside torch and transformers a collection that looks through
        # all of it takes as long as a short prompt, and no request is to meet one.
        gc.collect()
        gc.freeze()
        channel.send(ready)
        process.run()
    except ChannelClosed:
        return 0
    except ManyLoraError as error:
        channel.send(StartFailed(error_info(error, "start")))
        return 1
    except Exception:
        log.critical("the engine has failed; its process ends", exc_info=True)
        return 1
    finally:
        channel.close()
    return 0


if __name__ == "__main__":
    status = main()
    # Nothing is left to be saved, and a thread that waits for a slow root must not keep the process.
    os._exit(status)
