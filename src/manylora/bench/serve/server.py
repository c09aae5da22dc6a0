"""The server that is measured: one that runs already, or `manylora serve`, started here and ended."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from manylora.bench.serve.metrics import Scrape, parse_metrics
from manylora.errors import ConfigError

START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0
KEY_FILE = "keys.json"


@dataclass(frozen=True)
class Server:
    """What the load needs to know of a server."""

    url: str
    keys: tuple[str, ...]
    """Of the tenants, in turn; empty: none is asked for."""

    admin_key: str | None
    """May read the metrics."""

    base: str
    adapters: tuple[str, ...]
    """Names that requests may give."""

    def scrape(self) -> Scrape:
        return parse_metrics(_get(self.url + "/metrics", self.admin_key))

    @property
    def tells_metrics(self) -> bool:
        """Whether its /metrics are manylora's, and may be read."""
        try:
            return "manylora_steps_total" in self.scrape()
        except (urllib.error.URLError, ValueError):
            return False


def running_server(url: str, keys: Sequence[str], num_tenants: int, num_adapters: int) -> Server:
    """Ask a server that runs already for its names.

    Raises:
        ConfigError: it does not answer, or offers fewer adapters.
    """
    url = url.rstrip("/").removesuffix("/v1")
    admin_key = keys[0] if keys else None
    try:
        models: list[dict[str, Any]] = json.loads(_get(url + "/v1/models", admin_key))["data"]
    except (urllib.error.URLError, ValueError, KeyError) as error:
        raise ConfigError(f"{url}/v1/models does not answer as OpenAI's API does: {error}") from None
    bases = [model["id"] for model in models if not model.get("parent")]
    adapters = sorted(model["id"] for model in models if model.get("parent"))
    if not bases or len(adapters) < num_adapters:
        raise ConfigError(
            f"{url} offers {len(bases)} base models and {len(adapters)} adapters; a base and {num_adapters} adapters "
            "are needed: ask for fewer, or serve more"
        )
    each = tuple(keys) if len(keys) == num_tenants else tuple(keys) * num_tenants
    return Server(url, each, admin_key, bases[0], tuple(adapters[:num_adapters]))


@contextmanager
def started_server(
    model: str, adapters_folder: Path, adapters: Sequence[str], num_tenants: int, options: Sequence[str]
) -> Iterator[Server]:
    """Run `manylora serve` on a free port, with a key for each tenant, until the `with` ends.

    An error that leaves the `with` carries the end of what the server said.

    Args:
        options: more of its command line.
    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    keys = tuple(f"sk-{secrets.token_hex(16)}" for _ in range(num_tenants))
    with (
        tempfile.TemporaryDirectory(prefix="manylora-serve-") as folder,
        tempfile.TemporaryFile("w+") as log,
    ):
        key_file = Path(folder, KEY_FILE)
        key_file.write_text(json.dumps({"keys": [_entry(number, key) for number, key in enumerate(keys)]}))
        port = _free_port()
        command = [sys.executable, "-m", "manylora", "serve", model, "--adapters", str(adapters_folder)]
        command += [
            "--port",
            str(port),
            "--served-model-name",
            "base",
            "--api-keys",
            str(key_file),
            *options,
        ]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
            server = Server(f"http://127.0.0.1:{port}", keys, keys[0], "base", tuple(adapters))
            try:
                _wait_until_ready(server.url, process)
                _warm_up(server)
                yield server
            except Exception as error:
                error.add_note(f"manylora serve said:\n{_tail(log)}")
                raise
            finally:
                _end(process)


def _entry(number: int, key: str) -> dict[str, Any]:
    # The first one is the bench's own too.
    return {"key": key, "tenant": f"tenant-{number}", "adapters": ["*"], "admin": number == 0}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise RuntimeError(f"manylora serve ended with code {process.returncode}")
        try:
            _get(url + "/ready", None)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"manylora serve was not ready after {START_TIMEOUT_S:.0f} s")


def _warm_up(server: Server) -> None:
    """One short answer of the base: what is made for the first request is not the trace's to pay."""
    body = {
        "model": server.base,
        "prompt": [1, 2, 3],
        "max_tokens": 2,
        "ignore_eos": True,
        "temperature": 0,
    }
    _get(server.url + "/v1/completions", server.admin_key, json.dumps(body).encode())


def _get(url: str, key: str | None, body: bytes | None = None) -> str:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=body, headers=headers)
    # What is measured is near: no proxy that the environment may name.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=CALL_TIMEOUT_S) as response:
        return str(response.read().decode())


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-4000:]
