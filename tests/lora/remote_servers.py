"""Servers on 127.0.0.1 that hold adapters: plain HTTP with faults on demand, and the Hub's read API in small."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Run a server; gives its URL."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class FolderServer(ThreadingHTTPServer):
    """Serves a folder, with listings and Last-Modified, as `python -m http.server` does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_FolderHandler, directory=os.fspath(folder)))
        self.requests: list[str] = []
        self.cut_after: int | None = None
        """Close the connection after that many bytes of a tensor file."""

        self.status: int | None = None
        """Answer everything with this status."""

        self.leave_out: set[str] = set()
        """Headers that are not sent."""

        self.before_tensors: Callable[[], None] = lambda: None
        """Called before a tensor file is sent."""


class _FolderHandler(SimpleHTTPRequestHandler):
    server: FolderServer

    def parse_request(self) -> bool:
        return super().parse_request() and not self._refused()

    def _refused(self) -> bool:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.status is not None:
            self.send_error(self.server.status)
            return True
        if self.command == "GET" and self.path.endswith(".safetensors"):
            self.server.before_tensors()
        return False

    def send_header(self, keyword: str, value: str) -> None:
        if keyword not in self.server.leave_out:
            super().send_header(keyword, value)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.server.cut_after is None or not self.path.endswith(".safetensors"):
            return super().copyfile(source, outputfile)
        outputfile.write(source.read(self.server.cut_after))
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class HubServer(ThreadingHTTPServer):
    """The part of the Hugging Face Hub's API that reads one revision of model repositories."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files: dict[str, bytes] = {}
        """Content by "org/repo/path"."""

        self.requests: list[str] = []


class _HubHandler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            if not any(name.startswith(repo + "/") for name in self.server.files):
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["tree"]:
                tree = self._tree(repo, "/".join(rest[2:]), recursive="recursive=True" in self.path)
                self._send(200, json.dumps(tree).encode())
            else:
                self._send(200, json.dumps({"id": repo, "sha": "0" * 40}).encode())
        else:
            name = "/".join((*parts[:2], *parts[4:]))  # org/repo/resolve/main/path
            self._send(200, self.server.files[name])

    def _tree(self, repo: str, folder: str, recursive: bool) -> list[dict[str, object]]:
        """What lies in a folder of a repository; with `recursive`, below its folders too."""
        entries: dict[str, dict[str, object]] = {}
        below = f"{folder}/" if folder else ""
        for name, data in self.server.files.items():
            path = name.removeprefix(repo + "/")
            if path == name or not path.startswith(below):
                continue
            child, slash, _ = path.removeprefix(below).partition("/")
            if slash:
                entries[below + child] = {"type": "directory", "path": below + child, "oid": "0" * 40}
            if recursive or not slash:
                oid = hashlib.sha1(data).hexdigest()
                entries[path] = {"type": "file", "path": path, "size": len(data), "oid": oid}
        return list(entries.values())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for keyword, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(keyword, value)
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass
