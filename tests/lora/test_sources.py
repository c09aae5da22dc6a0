"""Adapters from URLs, with servers on this machine: what every file system must do, then what each does its way."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from huggingface_hub import HfFileSystem
from moto.server import ThreadedMotoServer

from manylora.errors import AdapterFormatError, AdapterNotFoundError, AdapterUnavailableError, ConfigError
from manylora.lora import downloads
from manylora.lora.downloads import DownloadCache
from manylora.lora.formats import load_peft
from manylora.lora.library import Library
from manylora.lora.remote import RemoteSource
from tests.lora.peft_files import CONFIG_FILE, SITE, TENSOR_FILE, peft_files, write_adapter
from tests.lora.remote_servers import FolderServer, HubServer, serving

CLOSED = "http://127.0.0.1:9"  # the discard port: nobody listens


@dataclass
class Remote:
    """A remote root, and how to write to it from behind."""

    url: str
    options: dict[str, Any]
    put: Callable[[str, bytes], None]
    delete: Callable[[str], None]

    def put_adapter(self, name: str, seed: int, rank: int = 4) -> None:
        for file, data in peft_files(seed, rank).items():
            self.put(f"{name}/{file}", data)

    def library(self, cache_dir: Path, **settings: Any) -> Library:
        return Library(self.url, cache_dir=cache_dir, storage_options={self.url: self.options}, **settings)


class FolderRemote(Remote):
    """A folder behind an HTTP server. Its clock moves a second at each write: Last-Modified tells no less."""

    def __init__(self, url: str, server: FolderServer, folder: Path) -> None:
        super().__init__(url, {}, self._put, lambda path: (folder / path).unlink())
        self.server, self.folder, self.now = server, folder, 1_700_000_000

    def _put(self, path: str, data: bytes) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(data)
        self.now += 1
        os.utime(self.folder / path, (self.now, self.now))


@pytest.fixture
def http(tmp_path: Path) -> Iterator[FolderRemote]:
    folder = tmp_path / "served" / "adapters"
    folder.mkdir(parents=True)
    server = FolderServer(tmp_path / "served")
    with serving(server) as url:
        yield FolderRemote(f"{url}/adapters/", server, folder)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, request: pytest.FixtureRequest) -> Remote:
    options = {
        "key": "not-a-key",
        "secret": "not-a-secret",
        "endpoint_url": s3_server,
        "client_kwargs": {"region_name": "eu-central-1"},
    }
    bucket = f"bucket-{abs(hash(request.node.nodeid))}"
    # A client of its own, so that the library's caches learn nothing of what is written.
    fs = fsspec.filesystem("s3", **options, skip_instance_cache=True)
    fs.mkdir(bucket)
    root = f"{bucket}/team adapters"
    return Remote(
        f"s3://{root}",
        options,
        lambda path, data: fs.pipe_file(f"{root}/{path}", data),
        lambda path: fs.rm(f"{root}/{path}"),
    )


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Remote:
    fs, root = fsspec.filesystem("memory"), f"/{abs(hash(request.node.nodeid))}"
    return Remote(
        f"memory:/{root}",
        {},
        lambda path, data: fs.pipe_file(f"{root}/{path}", data),
        lambda path: fs.rm(f"{root}/{path}"),
    )


@pytest.fixture
def hub() -> Iterator[Remote]:
    server = HubServer()
    with serving(server) as url:
        yield Remote(
            "hf://team",
            {"endpoint": url, "token": False, "skip_instance_cache": True},
            lambda path, data: server.files.update({f"team/{path}": data}),
            lambda path: server.files.__delitem__(f"team/{path}"),
        )


@pytest.fixture(params=["memory", "http", "s3", "hub"])
def remote(request: pytest.FixtureRequest) -> Remote:
    remote: Remote = request.getfixturevalue(request.param)
    return remote


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left_behind(cache_dir: Path) -> list[str]:
    return sorted(entry.name for entry in cache_dir.iterdir())


def local_identity(seed: int, tmp_path: Path, rank: int = 4) -> str:
    return load_peft(write_adapter(tmp_path / f"local-{seed}", seed, rank)).identity


# What every file system must do


def test_a_remote_adapter_is_the_local_one(remote, cache_dir, tmp_path):
    for seed, name in enumerate(["alice", "bob"]):
        remote.put_adapter(name, seed)
    library = remote.library(cache_dir)
    assert left_behind(cache_dir) == []
    ref = library.locate("alice")
    assert (ref.kind, ref.num_bytes) == ("remote", len(peft_files(0)[TENSOR_FILE]))
    assert left_behind(cache_dir) == [], "locating fetches nothing"
    assert library.load(ref).identity == local_identity(0, tmp_path)
    assert library.load("bob").identity == local_identity(1, tmp_path)
    assert len(left_behind(cache_dir)) == 2
    with pytest.raises(AdapterNotFoundError, match="no adapter 'carol'"):
        library.load("carol")
    assert "alice" in library
    assert "carol" not in library
    assert library.identity(ref) == local_identity(0, tmp_path)


def test_a_changed_file_is_a_new_version(remote, cache_dir, tmp_path):
    remote.put_adapter("alice", 1)
    library = remote.library(cache_dir)
    before = library.locate("alice")
    assert library.load(before).identity == local_identity(1, tmp_path)
    remote.put_adapter("alice", 2)
    after = library.locate("alice")
    assert after != before
    assert library.load(after).identity == local_identity(2, tmp_path)
    assert library.load("alice").identity == local_identity(2, tmp_path)
    # The first version was fetched, so the ref to it still holds. One that was never fetched cannot.
    assert library.load(before).identity == local_identity(1, tmp_path)
    remote.put_adapter("alice", 3)
    with pytest.raises(AdapterNotFoundError, match="locate it again"):
        library.load(replace(after, version="0" * 32))
    assert len(left_behind(cache_dir)) == 2


def test_a_missing_tensor_file_is_said(remote, cache_dir):
    remote.put_adapter("alice", 1)
    remote.delete(f"alice/{TENSOR_FILE}")
    library = remote.library(cache_dir)
    with pytest.raises(AdapterFormatError, match=f"has no {TENSOR_FILE}"):
        library.load("alice")
    assert left_behind(cache_dir) == []


def test_a_truncated_tensor_file_is_refused_until_it_is_replaced(remote, cache_dir, tmp_path):
    remote.put_adapter("alice", 1)
    remote.put(f"alice/{TENSOR_FILE}", peft_files(1)[TENSOR_FILE][:-5])
    library = remote.library(cache_dir)
    for _ in range(2):
        with pytest.raises(AdapterFormatError, match="truncated"):
            library.load("alice")
    remote.put_adapter("alice", 1)
    assert library.load("alice").identity == local_identity(1, tmp_path)


def test_names_that_leave_the_root_are_refused_before_anything_is_asked(remote, cache_dir, monkeypatch):
    remote.put_adapter("alice", 1)
    library = remote.library(cache_dir)
    source = library._listings[0].source
    monkeypatch.setattr(source, "_fs", None)
    for name in (
        "../alice",
        "alice/..",
        "/alice",
        "alice\\x",
        "alice?versionId=1",
        "alice@refs/pr/1",
        "a\0",
        ".x",
    ):
        with pytest.raises(AdapterNotFoundError, match="cannot be the name"):
            library.load(name)
    with pytest.raises(AdapterUnavailableError, match="'NoneType'"):
        library.load("alice")


def test_limits_are_checked_before_fetching(remote, cache_dir):
    remote.put_adapter("alice", 1, rank=8)
    library = remote.library(cache_dir, max_bytes=len(peft_files(1, 8)[TENSOR_FILE]) - 1)
    with pytest.raises(AdapterFormatError, match="max_bytes"):
        library.load("alice")
    assert left_behind(cache_dir) == []
    with pytest.raises(AdapterFormatError, match=rf"rank 8 at site '{SITE}'"):
        remote.library(cache_dir, max_rank=4).load("alice")


def test_point_takes_urls_below_a_root(remote, cache_dir):
    for seed, name in enumerate(["alice", "bob"]):
        remote.put_adapter(name, seed)
    library = remote.library(cache_dir)
    library.point("live", library.locate("alice").location)
    ref = library.locate("live")
    library.point("live", "bob")
    assert library.load(ref).identity == library.load("alice").identity
    assert library.load("live").identity == library.load("bob").identity
    for url in (
        "memory://elsewhere/alice",
        remote.url,
        f"{remote.url.rstrip('/')}/../alice",
        f"{remote.url}x/alice",
    ):
        with pytest.raises(AdapterNotFoundError):
            library.point("live", url)


# Listing and odd names


@pytest.mark.parametrize("kind", ["memory", "http", "s3"])
def test_names_below_a_remote_root(kind, request, cache_dir, tmp_path):
    remote: Remote = request.getfixturevalue(kind)
    names = ["alice", "team/bob", "with spaces", "ünï-木", "per%cent", "hash#tag", "a&b=c"]
    for seed, name in enumerate(names):
        remote.put_adapter(name, seed)
    remote.put("no-adapter/readme.txt", b"")
    remote.put(CONFIG_FILE, b"{}")
    library = remote.library(cache_dir)
    assert library.names() == sorted(names)
    for seed, name in enumerate(names):
        assert library.load(name).identity == local_identity(seed, tmp_path)
    remote.put_adapter("late", 50)
    assert "late" in library
    assert "late" in library.names()
    remote.put_adapter("later", 51)
    library.refresh()
    assert "later" in library.names()
    remote.delete(f"later/{CONFIG_FILE}")
    assert "later" not in library, "what a listing told is not believed"
    with pytest.raises(AdapterNotFoundError, match="'alice'"):
        library.load("alise")


def test_a_root_that_was_not_listed_is_not_listed_for_an_error(http, cache_dir):
    http.put_adapter("alice", 1)
    with pytest.raises(AdapterNotFoundError, match=f"holds 0 names, not counting {http.url.rstrip('/')}"):
        http.library(cache_dir).load("alise")
    assert not [request for request in http.server.requests if request.endswith("/")]


def test_a_hub_organisation_has_no_listing_but_a_repository_has(hub, cache_dir):
    hub.put_adapter("styles/papercut", 1)
    assert hub.library(cache_dir).names() == []
    repository = Library(
        "hf://team/styles", cache_dir=cache_dir, storage_options={"hf://team/styles": hub.options}
    )
    assert repository.names() == ["papercut"]
    assert repository.load("papercut").sites


def test_a_root_may_be_a_bare_protocol(hub, cache_dir, tmp_path):
    hub.put_adapter("styles/papercut", 1)
    library = Library("hf://", cache_dir=cache_dir, storage_options={"hf://": hub.options})
    ref = library.locate("team/styles/papercut")
    assert ref.location == "hf://team/styles/papercut"
    assert library.load(ref).identity == local_identity(1, tmp_path)
    assert library.names() == []
    options = {"memory://": {"global_store": False, "skip_instance_cache": True}}
    assert Library("memory://", cache_dir=cache_dir, storage_options=options).names() == []


# HTTP


def test_percent_escapes_do_not_leave_the_root(http, cache_dir):
    write_adapter(http.folder.parent / "secret", 9)
    outside = Library(http.url.removesuffix("adapters/"), cache_dir=cache_dir)
    assert outside.load("secret").sites
    for name in ("%2e%2e/secret", "%2E%2E%2Fsecret", "..%2fsecret"):
        with pytest.raises(AdapterNotFoundError):
            http.library(cache_dir).load(name)
    assert not [
        request for request in http.server.requests[8:] if request.endswith(f" /secret/{CONFIG_FILE}")
    ]


def test_a_connection_cut_mid_file_leaves_nothing_behind(http, cache_dir, tmp_path):
    http.put_adapter("alice", 1)
    library = http.library(cache_dir)
    http.server.cut_after = 100
    with pytest.raises(AdapterUnavailableError, match="could not send adapter 'alice'"):
        library.load("alice")
    assert left_behind(cache_dir) == []
    http.server.cut_after = None
    assert library.load("alice").identity == local_identity(1, tmp_path)


def test_a_client_that_gives_less_without_a_word_is_not_believed(memory, cache_dir, monkeypatch):
    memory.put_adapter("alice", 1)
    library = memory.library(cache_dir)
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(
        fs, "get_file", lambda remote, local: Path(local).write_bytes(fs.cat_file(remote)[:100])
    )
    with pytest.raises(AdapterUnavailableError, match=r"came with 100 bytes, expected \d{3}"):
        library.load("alice")
    assert left_behind(cache_dir) == []


def test_a_file_replaced_while_it_is_fetched_is_fetched_again(http, cache_dir, tmp_path):
    http.put_adapter("alice", 1)
    library = http.library(cache_dir)
    replacements = iter([2, 3])

    def replace() -> None:
        if seed := next(replacements, None):
            http.put_adapter("alice", seed)

    http.server.before_tensors = replace
    assert library.load("alice").identity == local_identity(3, tmp_path)
    assert len(left_behind(cache_dir)) == 1, "what was fetched half old, half new is gone"


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_server_that_refuses_is_not_taken_for_one_that_has_no_such_name(http, cache_dir, status):
    http.put_adapter("alice", 1)
    library = http.library(cache_dir)
    assert "alice" in library
    http.server.status = status
    with pytest.raises(
        AdapterUnavailableError, match=rf"root '{http.url.rstrip('/')}' could not say.*{status}"
    ):
        library.load("alice")
    with pytest.raises(AdapterUnavailableError):
        assert "alice" in library


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_without_listings_has_no_names(http, cache_dir, status):
    library = http.library(cache_dir)
    http.server.status = status
    assert library.names() == []


@pytest.mark.parametrize("header", ["Last-Modified", "Content-Length"])
def test_a_server_that_tells_too_little_is_refused(http, cache_dir, header):
    http.put_adapter("alice", 1)
    http.server.leave_out = {header}
    with pytest.raises(AdapterFormatError, match="neither ETag nor Last-Modified"):
        http.library(cache_dir).load("alice")


def test_fetched_once_for_all_threads_and_for_good(http, cache_dir):
    http.put_adapter("alice", 1)
    library = http.library(cache_dir)
    with ThreadPoolExecutor(8) as pool:
        assert len({adapter.identity for adapter in pool.map(library.load, ["alice"] * 8)}) == 1
    http.library(cache_dir).load("alice")
    fetched = [request for request in http.server.requests if request.startswith("GET")]
    assert len(fetched) == 2, "two files, once each"


# Roots that do not answer


@pytest.mark.parametrize(
    ("url", "options"),
    [
        (f"{CLOSED}/adapters", {}),
        ("hf://team", {"endpoint": CLOSED, "token": False, "skip_instance_cache": True}),
    ],
)
@pytest.mark.parametrize(
    "act", [lambda library: library.load("alice"), lambda library: library.locate("alice")]
)
def test_a_root_that_cannot_be_reached_is_named_at_once(url, options, act, cache_dir):
    library = Library(url, cache_dir=cache_dir, storage_options={url: options})
    started = time.perf_counter()
    with pytest.raises(
        AdapterUnavailableError, match=f"adapter root '{url}' could not say whether it holds 'alice'"
    ):
        act(library)
    assert time.perf_counter() - started < 2
    assert left_behind(cache_dir) == []


def test_an_unreachable_root_is_not_an_empty_one(cache_dir):
    with pytest.raises(AdapterUnavailableError, match="could not list its names"):
        Library(f"{CLOSED}/adapters", cache_dir=cache_dir).names()


def test_hub_urls_are_read_by_the_hub_client(cache_dir):
    source = RemoteSource("hf://team", {}, DownloadCache(cache_dir))
    assert isinstance(source._fs, HfFileSystem)
    assert source.name_of("hf://team/styles/papercut") == "styles/papercut"
    assert source.name_of("hf://teamwork/styles/papercut") is None


def test_credentials_in_a_url_are_not_shown(cache_dir):
    library = Library(f"http://user:hunter2@{CLOSED[7:]}/adapters", cache_dir=cache_dir)
    with pytest.raises(AdapterUnavailableError) as raised:
        library.load("alice")
    assert CLOSED in str(raised.value)
    assert "hunter2" not in str(raised.value)
    assert "user" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nosuch://bucket", "nosuch"),
        ("http://host/path?token=1", r"with no '\?'"),
        ("http:///path", "http"),
        ("file:///tmp", "give its path"),
    ],
)
def test_roots_that_cannot_work_are_refused(url, says, cache_dir):
    with pytest.raises(ConfigError, match=says):
        Library(url, cache_dir=cache_dir)


# The download cache


def test_a_full_disk_leaves_nothing_behind(http, cache_dir, tmp_path):
    http.put_adapter("alice", 1, rank=1024)
    library = http.library(cache_dir)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing more fails, as on a full disk
    try:
        with pytest.raises(AdapterUnavailableError, match="cannot be stored in cache_dir: File too large"):
            library.load("alice")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert left_behind(cache_dir) == []
    assert library.load("alice").identity == local_identity(1, tmp_path, rank=1024)


DOWNLOAD_TOGETHER = """
import runpy, sys
from pathlib import Path

def download(folder):
    (folder / "one").write_bytes(b"1" * 1000)
    print("begun", flush=True)
    sys.stdin.readline()
    (folder / "two").write_bytes(b"2" * 1000)

cache = runpy.run_path(sys.argv[1])["DownloadCache"](Path(sys.argv[2]))  # the file alone starts 20 times faster
print(cache.get("key", download))
"""


def test_two_processes_that_download_at_once_end_with_one_good_copy(cache_dir):
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DOWNLOAD_TOGETHER, downloads.__file__, os.fspath(cache_dir)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start() as one, start() as two:
        for process in (one, two):
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
        assert [name.startswith(".partial-") for name in left_behind(cache_dir)] == [True, True]
        outputs = [process.communicate("go\n")[0].strip() for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0)
    assert outputs == [str(cache_dir / "key")] * 2
    assert left_behind(cache_dir) == ["key"]
    assert {path.name: path.stat().st_size for path in (cache_dir / "key").iterdir()} == {
        "one": 1000,
        "two": 1000,
    }


def test_a_failing_download_leaves_nothing_and_the_next_succeeds(cache_dir):
    cache = DownloadCache(cache_dir)

    def fail(folder: Path) -> None:
        (folder / "one").write_bytes(b"1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get("key", fail)
    assert left_behind(cache_dir) == []
    assert cache.get("key", lambda folder: None) == cache_dir / "key"


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_a_copy_that_lost_a_file_is_fetched_again(memory, cache_dir, tmp_path, file):
    memory.put_adapter("alice", 1)
    library = memory.library(cache_dir)
    assert library.load("alice").identity == local_identity(1, tmp_path)
    (kept,) = cache_dir.iterdir()
    for _ in range(2):  # a cleaner of temporary files comes more than once
        (kept / file).unlink()
        assert library.load("alice").identity == local_identity(1, tmp_path)
        assert left_behind(cache_dir) == [kept.name]


def test_what_a_killed_removal_left_is_not_in_the_way(cache_dir, monkeypatch):
    def fill(folder: Path) -> None:
        (folder / "file").write_bytes(b"new")

    cache = DownloadCache(cache_dir)
    for _ in range(3):
        folder = cache.get("key", fill, ["file"])
        assert (folder / "file").read_bytes() == b"new"
        (folder / "file").rename(folder / "other")
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)


def test_what_was_not_used_for_longest_is_removed(cache_dir):
    def fill(folder: Path) -> None:
        (folder / "file").write_bytes(b"x" * 1000)

    def age(key: str, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(cache_dir / key, (then, then))

    cache = DownloadCache(cache_dir, max_bytes=2500)
    for number, key in enumerate(["a", "b", "c"]):
        cache.get(key, fill)
        age(key, 1000 - number)
    assert left_behind(cache_dir) == ["b", "c"]
    cache.get("b", fill)  # used: now c is the oldest
    cache.get("d", fill)
    assert left_behind(cache_dir) == ["b", "d"]
    cache.get("e", fill)
    assert left_behind(cache_dir) == ["b", "d", "e"], "all of them may be in use: none is removed"


def test_files_that_another_process_removes_meanwhile_count_nothing(cache_dir, monkeypatch):
    cache = DownloadCache(cache_dir, max_bytes=1500)
    listed = downloads._files

    def listed_and_gone(folder: Path) -> list[Path]:
        files = listed(folder)
        if folder.name == "a":
            shutil.rmtree(folder)
        return files

    def fill(folder: Path) -> None:
        (folder / "file").write_bytes(b"x" * 1000)

    cache.get("a", fill)
    monkeypatch.setattr(downloads, "_files", listed_and_gone)
    cache.get("b", fill)
    assert left_behind(cache_dir) == ["b"]


def test_what_a_killed_process_left_is_removed_in_time(cache_dir):
    cache_dir.mkdir()
    for name, age_s in (
        (".partial-old", 2 * DownloadCache.ABANDONED_S),
        (".partial-new", 5.0),
        ("key", 1e8),
    ):
        (cache_dir / name).mkdir()
        os.utime(cache_dir / name, (time.time() - age_s,) * 2)
    DownloadCache(cache_dir)
    assert left_behind(cache_dir) == [".partial-new", "key"]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        Library("memory://x", cache_dir=tmp_path / "file" / "cache")


def test_others_cannot_write_to_the_cache(cache_dir):
    Library("memory://x", cache_dir=cache_dir)
    assert cache_dir.stat().st_mode & 0o077 == 0
