"""Starts both processes and ends them: signals, drain, exit status. Runs in the API process.

SIGTERM, SIGINT   new requests are refused and /ready says so, for drain_notice_s at least; requests under way go on up
                  to drain_timeout_s, what is left is cancelled, connections are closed; status 0. The second time,
                  cancel at once; while the model loads, leave at once.
the engine ends   requests under way are answered with an error; status 1.
this process ends the engine process sees its pipe close, and ends.
"""

import asyncio
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn
from transformers import PreTrainedTokenizerFast

from manylora import errors
from manylora.errors import ConfigError, ModelError
from manylora.server.channel import AsyncChannel, ChannelClosed
from manylora.server.config import ServerConfig
from manylora.server.connection import TimedConnection
from manylora.server.engine_client import CANCEL_GRACE_S, EngineClient, EngineError, StreamLimits
from manylora.server.logs import configure_logs
from manylora.server.messages import EngineSetup, Ready, StartFailed, ToApi
from manylora.server.tenants import Tenants
from manylora.server.tokenizer import build_tokenizer
from manylora.text.config import EngineConfig

END_TIMEOUT_S = 10.0
"""How long the engine process may take to end after its pipe was closed: one step, if it is well."""

log = logging.getLogger("manylora.server")


def serve(config: ServerConfig, engine: EngineConfig) -> int:
    """Serve until a signal comes or the engine ends; returns the exit status.

    Raises:
        ManyLoraError: the address is taken, or the engine cannot be built.
    """
    configure_logs(config.log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what it says of itself is said here
    return asyncio.run(_serve(config, engine))


@asynccontextmanager
async def running_engine(
    config: ServerConfig, engine: EngineConfig
) -> AsyncIterator[tuple[EngineClient, PreTrainedTokenizerFast]]:
    """Run an engine process, which ends with the `with`.

    Raises:
        ManyLoraError: it cannot be built, or not in time.
    """
    here, there = socket.socketpair()
    channel: AsyncChannel[ToApi] = await AsyncChannel.open(here, ToApi)
    with there:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "manylora.server.engine_process", str(there.fileno())),
            pass_fds=[there.fileno()],
            start_new_session=True,  # a terminal's Ctrl-C is for this process alone
        )
    try:
        channel.send(_setup(config, engine))
        ready = await _ready(channel, config.start_timeout_s)
    except BaseException:
        await channel.close()
        await _kill(process)  # it may be loading a model, deaf to its pipe
        raise
    limits = StreamLimits(max_backlog=config.max_backlog, client_timeout_s=config.client_timeout_s)
    client = EngineClient(channel, ready, limits, call_timeout_s=config.call_timeout_s)
    try:
        yield client, build_tokenizer(ready.tokenizer)
    finally:
        if not client.is_alive:
            log.critical("the engine process has ended by itself")
        await client.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            log.error("the engine process did not end within %g s and is killed", END_TIMEOUT_S)
            await _kill(process)


async def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):  # it was quicker
        process.kill()
    await process.wait()


async def _serve(config: ServerConfig, engine: EngineConfig) -> int:
    loading = asyncio.current_task()
    assert loading is not None
    _on_signals(loading.cancel)
    try:
        # What may be refused comes before minutes of loading. The address is listened on only when there is an engine.
        Tenants.load(config.api_keys)
        with _bound(config) as listener:
            async with running_engine(config, engine) as (client, tokenizer):
                return await _serve_http(config, client, tokenizer, listener)
    except asyncio.CancelledError:
        log.info("told to end while the model was loading")
        return 0


async def _serve_http(
    config: ServerConfig, client: EngineClient, tokenizer: PreTrainedTokenizerFast, listener: socket.socket
) -> int:
    from manylora.server.app import create_app

    stop, at_once = asyncio.Event(), asyncio.Event()

    def told_to_end() -> None:
        if stop.is_set():
            at_once.set()
            client.cancel_all()
        stop.set()

    _on_signals(told_to_end)
    server = _Server(
        uvicorn.Config(
            create_app(client, config, tokenizer),
            http=partial(TimedConnection, head_timeout_s=config.body_timeout_s),  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=config.keep_alive_s,
        )
    )
    serving = asyncio.create_task(server.serve([listener]))
    announcing = asyncio.create_task(_announce(config, client, listener))
    await _first(stop.wait(), client.closed.wait(), serving)
    status = 0 if client.is_alive and stop.is_set() else 1
    log.info("%s; draining", "told to end" if status == 0 else "the engine or the HTTP server has stopped")
    began = time.monotonic()
    end = began + max(config.drain_timeout_s, config.drain_notice_s) + CANCEL_GRACE_S
    # Only afterwards are connections refused: whoever balances load asks /ready, and is told to ask others.
    await client.drain(config.drain_timeout_s)
    if status == 0:
        notice = asyncio.sleep(began + config.drain_notice_s - time.monotonic())
        await _first(notice, at_once.wait(), client.closed.wait(), serving)
    # What was answered is on its way to clients, who have the rest of the time to read it.
    server.config.timeout_graceful_shutdown = max(1, math.ceil(end - time.monotonic()))
    server.should_exit = True
    await serving
    announcing.cancel()
    return status


class _Server(uvicorn.Server):
    """Leaves signals to this module."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _announce(config: ServerConfig, client: EngineClient, listener: socket.socket) -> None:
    """Say once what is served where."""
    host, port = listener.getsockname()[:2]
    seconds = time.monotonic() - _STARTED
    try:
        num_adapters = len(await client.names())
    except EngineError as error:  # a remote root that does not answer yet may do so later
        num_adapters = None
        log.warning("the adapters cannot be listed: %s", error)
    fields = {
        "url": f"http://{f'[{host}]' if ':' in host else host}:{port}/v1",
        "model": config.served_model_name or client.model.name,
        "dtype": client.model.dtype,
        "num_adapters": num_adapters,
        "pool_bytes": client.model.pool_bytes,
        "policy": config.policy,
        "seconds": round(seconds, 2),
    }
    log.info("ready", extra={"fields": fields})


_STARTED = time.monotonic()
"""When this module was imported: a second or so after the command was given."""


def _setup(config: ServerConfig, engine: EngineConfig) -> EngineSetup:
    return EngineSetup(
        model=config.model,
        dtype=config.dtype,
        device=config.device,
        engine=engine,
        policy=config.policy,
        policy_options=config.policy_values,
        adapters=config.adapters,
        cache_dir=None if config.cache_dir is None else str(config.cache_dir),
        max_cache_bytes=config.max_cache_bytes,
        max_rank=config.max_rank,
        max_adapter_bytes=config.max_adapter_bytes,
        max_loaded_adapters=config.max_loaded_adapters,
        resolve_timeout_s=config.resolve_timeout_s,
        fetch_timeout_s=config.fetch_timeout_s,
        log_format=config.log_format,
    )


async def _ready(channel: AsyncChannel[ToApi], timeout_s: float) -> Ready:
    try:
        async with asyncio.timeout(timeout_s):
            message = await channel.receive()
    except TimeoutError:
        raise ModelError(f"the model was not loaded within {timeout_s:g} s (start_timeout_s)") from None
    except ChannelClosed:
        raise ModelError("the engine process ended before it was ready; its log says why") from None
    if isinstance(message, StartFailed):
        kind: type[errors.ManyLoraError] = getattr(errors, message.error.kind)
        raise kind(message.error.message)
    assert isinstance(message, Ready), message
    return message


def _bound(config: ServerConfig) -> socket.socket:
    """A socket that has the address, and does not listen yet.

    Raises:
        ConfigError: the address is taken, or is not one of this machine.
    """
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections inherit it: what a client leaves unread so long in the kernel's buffers ends its connection.
            milliseconds = int(config.client_timeout_s * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another --host or --port"
            ) from None
        stack.pop_all()
    return listener


def _on_signals(handler: Callable[[], object]) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, handler)


async def _first(*waited: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait for one of them. Tasks go on; coroutines are cancelled."""
    own = [asyncio.create_task(one) for one in waited if isinstance(one, Coroutine)]
    await asyncio.wait(
        [*own, *(one for one in waited if isinstance(one, asyncio.Task))], return_when="FIRST_COMPLETED"
    )
    for task in own:
        task.cancel()
