"""One real engine process on the tiny model for all tests of this folder, and HTTP servers in front of it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from manylora.lora.formats import save_peft
from manylora.models.tiny import save_tiny, tiny_adapter, tiny_config
from manylora.server.app import create_app
from manylora.server.config import ServerConfig
from manylora.server.engine_client import EngineClient
from manylora.server.launch import running_engine
from manylora.text.config import EngineConfig

ADAPTERS = ("alice", "bob", "team/carol", "ünïcode", "secret/dave")


class Running:
    """An engine process with an event loop in a thread, on which servers run."""

    def __init__(self, config: ServerConfig, engine: EngineConfig) -> None:
        self.config = config
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        self._ready: Future[tuple[EngineClient, Any]] = Future()
        self._end = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._run(),), daemon=True
        )

    def __enter__(self) -> Running:
        self._thread.start()
        self.client, self.tokenizer = self._ready.result(120)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine on the servers' loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    @contextmanager
    def serve(self, app: FastAPI, **options: Any) -> Iterator[str]:
        """Serve an app; gives its address."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = uvicorn.Server(
                uvicorn.Config(app, log_config=None, access_log=False, ws="none", **options)
            )
            served = asyncio.run_coroutine_threadsafe(server.serve([listener]), self._loop)
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                served.result(30)

    async def _run(self) -> None:
        try:
            async with running_engine(self.config, self._engine) as ready:
                self._ready.set_result(ready)
                await self._end.wait()
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def adapters_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ADAPTERS, 1):
        save_peft(tiny_adapter(tiny_config(), seed=seed, dtype=torch.bfloat16), folder / name)
    return folder


@pytest.fixture(scope="session")
def running(model_folder: Path, adapters_folder: Path) -> Iterator[Running]:
    config = ServerConfig(
        model=str(model_folder), adapters=(str(adapters_folder),), served_model_name="tiny"
    )
    engine = EngineConfig(pool_bytes=4 << 20, max_batch_tokens=64, max_num_seqs=16, debug=True)
    with Running(config, engine) as one:
        yield one


Serve = Callable[..., httpx.Client]


@pytest.fixture(scope="session")
def serve(running: Running) -> Iterator[Serve]:
    """Make a client of a new server: serve(setting=value, ..) in front of the one engine."""
    with ExitStack() as stack:

        def serve(headers: dict[str, str] | None = None, **settings: Any) -> httpx.Client:
            fixed = {"model": running.config.model, "adapters": running.config.adapters}
            config = ServerConfig(**{**fixed, "served_model_name": "tiny", **settings})
            url = stack.enter_context(running.serve(create_app(running.client, config, running.tokenizer)))
            return stack.enter_context(httpx.Client(base_url=url, timeout=60, headers=headers))

        yield serve


@pytest.fixture(scope="session")
def api(serve: Serve) -> httpx.Client:
    """A client of a server without API keys."""
    return serve()
