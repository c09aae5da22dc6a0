"""The library over local folders: names and what they may reach, re-pointing under load, limits."""

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from manylora.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ConfigError,
)
from manylora.lora import reader, sources
from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.formats import load_peft
from manylora.lora.library import Library
from manylora.lora.names import MAX_NAME_LEN, name_problem, near_matches
from tests.lora.peft_files import CONFIG_FILE, SITE, TENSOR_FILE, peft_files, write_adapter, write_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A sound adapter beside the root. Every test that refuses it first sees that it could be loaded."""
    folder = write_adapter(tmp_path / "secret-place", seed=99)
    assert load_peft(folder).sites
    return folder


def identity_of(seed: int, tmp_path: Path) -> str:
    return load_peft(write_adapter(tmp_path / f"reference-{seed}", seed)).identity


_opened: list[str] | None = None


def _record_open(event: str, args: tuple[object, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else str(args[0]))


sys.addaudithook(_record_open)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Collect the paths of all files that Python code opens inside the `with`."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


# Names


def test_names_are_paths_below_a_root(root):
    names = ["alice", "team/alice", "team", "with spaces", "ünï/cødé-木", "v1.0", "a~b@c#d?e%20f"]
    for seed, name in enumerate(names):
        write_adapter(root / name, seed)
    write_files(root / "no-adapter", {TENSOR_FILE: b""})
    library = Library(root)
    assert library.names() == sorted(names)
    assert len(library) == len(names)
    identities = {library.load(name).identity for name in names}
    assert len(identities) == len(names), "each name must give an adapter of its own"
    assert all(name in library for name in names)
    assert [name for name in ("no-adapter", "bob", 7, None) if name in library] == []
    assert library.load("team/alice").name == "team/alice"


def test_first_root_counts(tmp_path):
    write_adapter(tmp_path / "one" / "alice", 1)
    write_adapter(tmp_path / "two" / "alice", 2)
    write_adapter(tmp_path / "two" / "bob", 3)
    library = Library(tmp_path / "one", str(tmp_path / "two"))
    assert library.names() == ["alice", "bob"]
    assert library.load("alice").identity == identity_of(1, tmp_path)
    assert Library(tmp_path / "two", tmp_path / "one").load("alice").identity == identity_of(2, tmp_path)


def test_new_and_removed_folders_are_seen_without_refresh(root):
    library = Library(root)
    assert library.names() == []
    folder = write_adapter(root / "late", 1)
    assert library.load("late").identity
    assert library.names() == ["late"]
    write_adapter(root / "later", 2)
    assert library.names() == ["late"], "a listing is kept until refresh"
    library.refresh()
    assert library.names() == ["late", "later"]
    (folder / CONFIG_FILE).unlink()
    assert "late" not in library
    assert library.names() == ["later"]


def test_ten_thousand_adapters_are_listed_in_two_seconds_and_no_file_is_opened(root):
    write_adapter(root / "first", 1)
    for i in range(10_000):
        folder = os.path.join(root, f"adapter-{i:05d}")
        os.mkdir(folder)
        for file in (CONFIG_FILE, TENSOR_FILE):
            os.link(root / "first" / file, os.path.join(folder, file))
    with opened_files() as opened:
        # Time of this thread, kernel included: with the folders cached that is all there is to wait for.
        started = time.thread_time()
        library = Library(root)
        construct_s = time.thread_time() - started
        assert len(library) == 10_001
        list_s = time.thread_time() - started
        library.locate("adapter-07777")
        assert [path for path in opened if str(root) in path] == []
        library.load("adapter-07777")
        assert any(str(root) in path for path in opened), "the hook must see what load opens"
    started = time.thread_time()
    with pytest.raises(AdapterNotFoundError, match=r"10,001 names.*'adapter-07") as raised:
        library.locate("adapter-0777")
    miss_s = time.thread_time() - started
    print(f"10,001 adapters: construct {construct_s:.4f} s, list {list_s:.3f} s, a miss {miss_s:.3f} s")
    assert len(str(raised.value)) < 300
    assert construct_s < 0.1
    assert list_s < 2
    assert miss_s < 1


def test_a_name_that_is_missing_is_answered_with_near_ones(root):
    for seed, name in enumerate(["alice", "alicia", "team/alice", "zebra"]):
        write_adapter(root / name, seed)
    with pytest.raises(AdapterNotFoundError) as raised:
        Library(root).load("alise")
    assert "'alice'" in str(raised.value)
    assert "4 names" in str(raised.value)
    assert "zebra" not in str(raised.value)


def test_a_name_whose_files_are_gone_can_be_removed(root):
    folder = write_adapter(root / "alice", 1)
    library = Library(root)
    library.point("live", "alice")
    (folder / CONFIG_FILE).unlink()
    assert "live" in library.names()
    library.remove("live")
    assert "live" not in library.names()
    with pytest.raises(AdapterNotFoundError):
        library.remove("live")


def test_a_library_need_not_look_for_near_names(root, monkeypatch):
    write_adapter(root / "alice", 1)
    with pytest.raises(AdapterNotFoundError, match="Did you mean 'alice'"):
        Library(root).locate("alise")
    quiet = Library(root, suggests=False)
    monkeypatch.setattr(quiet._listings[0].source, "names", lambda: pytest.fail("the root is listed"))
    with pytest.raises(AdapterNotFoundError) as missing:
        quiet.locate("alise")
    assert str(missing.value) == "no adapter 'alise' in this library"


def test_near_matches():
    names = ["legal-v1", "legal-v2", "code/python", "code/rust", "papercut"]
    assert set(near_matches("legal-v3", names)[:2]) == {"legal-v1", "legal-v2"}
    assert near_matches("code/pyton", names)[0] == "code/python"
    assert near_matches("xyz", names) == []
    assert near_matches("a", []) == []


# What names may reach


@pytest.mark.parametrize(
    "name",
    [
        "../secret-place", "a/../../secret-place", "..", ".", "", "/", "a//b", "a/", "/etc", "./a", "a/./b",
        "..\\secret-place", "a\\b", "a\0b", "a\nb", "a\x7fb", "\udcff", ".hidden", "a/.hidden", "a+b", "a:0.5",
        "x" * (MAX_NAME_LEN + 1),
    ],
)  # fmt: skip
def test_names_that_would_leave_the_root_are_refused(root, outside, name):
    write_adapter(root / "a", 1)
    write_adapter(root / ".hidden", 1)
    library = Library(root)
    for attempt in (
        library.locate,
        library.load,
        lambda n: library.add(n, root / "a"),
        lambda n: library.point(n, "a"),
    ):
        with pytest.raises(AdapterNotFoundError) as raised:
            attempt(name)
        assert str(root.parent) not in str(raised.value)
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 250
    assert name not in library
    assert library.names() == ["a"]


def test_an_absolute_path_is_no_name(root, outside):
    with pytest.raises(AdapterNotFoundError, match="cannot be the name"):
        Library(root).load(str(outside))


@given(st.text(st.characters(exclude_categories=[]), max_size=12) | st.text("ab./\\~\0 ", max_size=12))
@settings(deadline=None, max_examples=300)
def test_what_may_be_a_name_stays_below_the_root(name):
    if name_problem(name) is None:
        path = os.path.join("/root", name)
        assert os.path.normpath(path) == path
        assert path.startswith("/root/")
        os.fsencode(path)


def test_a_folder_that_links_out_of_its_root_is_refused(root, outside):
    write_adapter(root / "alice", 1)
    (root / "bob").symlink_to(outside)
    (root / "team").symlink_to(outside.parent)
    library = Library(root)
    assert library.names() == ["alice"]
    for name in ("bob", f"team/{outside.name}", "team/adapters/alice/../../secret-place"):
        for attempt in (library.load, library.locate):
            with pytest.raises(
                AdapterNotFoundError, match=r"link out of its root|cannot be the name"
            ) as raised:
                attempt(name)
            assert str(outside) not in str(raised.value)
    # The same folder by a way around is still below the root.
    assert library.load("team/adapters/alice").identity == library.load("alice").identity


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_a_file_that_links_out_of_its_root_is_refused(root, outside, file):
    folder = write_adapter(root / "alice", 1)
    (folder / file).unlink()
    (folder / file).symlink_to(outside / file)
    assert load_peft(folder).sites
    with pytest.raises(AdapterFormatError, match="link out of its root") as raised:
        Library(root).load("alice")
    assert str(outside) not in str(raised.value)
    assert "alice" in Library(root), "it is there, only not sound"


def test_a_link_laid_after_locate_is_not_followed(root, outside):
    write_adapter(root / "alice", 1)
    library = Library(root)
    ref = library.locate("alice")
    (root / "alice").rename(root / "was-alice")
    (root / "alice").symlink_to(outside)
    with pytest.raises(AdapterNotFoundError, match="locate it again"):
        library.load(ref)


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_a_file_link_laid_after_locate_is_not_opened(root, outside, file):
    folder = write_adapter(root / "alice", 1)
    library = Library(root)
    ref = library.locate("alice")
    (folder / file).unlink()
    (folder / file).symlink_to(outside / file)
    with opened_files() as opened, pytest.raises(AdapterFormatError, match="link out of its root"):
        library.load(ref)
    assert [path for path in opened if str(root) in path or str(outside) in path] == []


def test_a_ref_from_elsewhere_is_not_followed(root, outside):
    ref = Library(outside.parent).locate(outside.name)
    with pytest.raises(AdapterNotFoundError, match="not below a root of this library"):
        Library(root).load(ref)


def test_links_inside_the_root_work_and_loops_end(root):
    write_adapter(root / "versions" / "v1", 1)
    (root / "current").symlink_to(root / "versions" / "v1")
    (root / "versions" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    library = Library(root)
    assert library.names() == ["current", "versions/v1"]
    assert library.load("current").identity == library.load("versions/v1").identity
    assert "self" not in library


def test_a_link_that_leads_nowhere_hides_no_other_name(root):
    write_adapter(root / "alice", 1)
    write_adapter(root / "below" / "bob", 2)
    for folder in (root, root / "below"):
        (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
        (folder / "through.safetensors").symlink_to(root / "alice" / CONFIG_FILE / "x")
        (folder / "absent.safetensors").symlink_to(folder / "absent")
    library = Library(root)
    assert library.names() == ["alice", "below/bob"]
    assert [name for name in ("loop", "through", "absent") if name in library] == []


def test_weights_whose_place_cannot_be_looked_at_are_named_with_the_reason(root):
    folder = write_adapter(root / "alice", 1)
    (folder / TENSOR_FILE).unlink()
    (folder / TENSOR_FILE).symlink_to(folder / TENSOR_FILE)
    with pytest.raises(AdapterUnavailableError, match=f"'alice': {TENSOR_FILE} cannot be read: Too many"):
        Library(root).load("alice")


def test_a_root_that_is_a_link_works(root, tmp_path):
    write_adapter(root / "alice", 1)
    (tmp_path / "link").symlink_to(root)
    library = Library(tmp_path / "link")
    assert library.load("alice").sites
    library.point("bob", root / "alice")
    assert library.locate("bob").location == library.locate("alice").location


@pytest.mark.timeout(20)
def test_a_named_pipe_is_refused_at_once(root):
    folder = write_adapter(root / "alice", 1)
    (folder / TENSOR_FILE).unlink()
    os.mkfifo(folder / TENSOR_FILE)
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        Library(root).load("alice")


def test_point_and_add_take_paths_below_a_root_only(root, outside):
    write_adapter(root / "alice", 1)
    library = Library(root)
    texts = set()
    for path in (outside, root / ".." / outside.name, outside.parent / "absent", root, root / "absent"):
        for attempt in (library.point, library.add):
            with pytest.raises(AdapterNotFoundError) as raised:
                attempt("bob", path)
            texts.add(str(raised.value).replace(str(path), "PATH"))
    assert len(texts) == 1, "the text must not tell whether something lies there"
    assert "bob" not in library
    library.point("bob", root / ".." / root.name / "alice")
    assert library.load("bob").identity == library.load("alice").identity


# Aliases


def test_point_add_and_remove(root, tmp_path):
    for seed, name in enumerate(["one", "two"]):
        write_adapter(root / name, seed)
    memory = load_peft(write_adapter(tmp_path / "elsewhere", 7))
    library = Library(root)
    library.add("three", memory)
    assert library.load("three") is memory
    assert library.identity(library.locate("three")) == memory.identity
    library.add("by-path", str(root / "one"))
    library.point("alias", "by-path")
    library.point("alias-of-memory", "three")
    assert library.names() == ["alias", "alias-of-memory", "by-path", "one", "three", "two"]
    assert library.load("alias").identity == library.load("one").identity
    assert library.load("alias").name == "alias"

    library.remove("by-path")
    library.remove("one")
    assert library.names() == ["alias", "alias-of-memory", "three", "two"]
    with pytest.raises(AdapterNotFoundError):
        library.load("one")
    assert library.load("alias").sites, "an alias points at the folder, not at the name"
    assert (root / "one" / CONFIG_FILE).exists(), "files stay"
    library.add("one", root / "one")
    assert "one" in library
    for missing in ("by-path", "never"):
        with pytest.raises(AdapterNotFoundError):
            library.remove(missing)
        with pytest.raises(AdapterNotFoundError):
            library.point("x", missing)


def test_a_name_may_point_at_itself_and_swap(root):
    a, b = (load_peft(write_adapter(root / name, seed)).identity for seed, name in enumerate(["a", "b"]))
    library = Library(root)
    library.point("a", "a")
    assert library.load("a").identity == a
    library.point("a", "b")
    library.point("b", root / "a")
    assert (library.load("a").identity, library.load("b").identity) == (b, a)


def test_refs_keep_what_the_name_pointed_at(root, tmp_path):
    for seed, name in enumerate(["v1", "v2"]):
        write_adapter(root / name, seed)
    memory = load_peft(write_adapter(tmp_path / "elsewhere", 7))
    library = Library(root)
    library.point("live", "v1")
    first = library.locate("live")
    library.point("live", "v2")
    second = library.locate("live")
    library.add("live", memory)
    third = library.locate("live")
    library.remove("live")
    assert len({first, second, third}) == 3
    want = [library.load("v1").identity, library.load("v2").identity, memory.identity]
    assert [library.load(ref).identity for ref in (first, second, third)] == want
    assert len(set(want)) == 3


def test_a_ref_survives_the_flip_of_a_link(root):
    for seed, name in enumerate(["v1", "v2"]):
        write_adapter(root / name, seed)
    (root / "current").symlink_to("v1")
    library = Library(root)
    ref = library.locate("current")
    (root / "next").symlink_to("v2")
    (root / "next").replace(root / "current")
    assert library.load(ref).identity == library.load("v1").identity
    assert library.load("current").identity == library.load("v2").identity


def test_a_ref_never_gives_what_was_written_over_it(root):
    folder = write_adapter(root / "alice", 1)
    library = Library(root)
    ref = library.locate("alice")
    before = library.load(ref).identity
    assert library.identity(ref) == before
    status = (folder / TENSOR_FILE).stat()
    (folder / TENSOR_FILE).write_bytes(peft_files(2)[TENSOR_FILE])
    os.utime(folder / TENSOR_FILE, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (folder / TENSOR_FILE).stat().st_size == status.st_size
    with pytest.raises(AdapterNotFoundError, match="locate it again"):
        library.load(ref)
    now = library.locate("alice")
    assert now != ref
    assert library.identity(now) is None
    assert library.load("alice").identity != before


def test_a_file_renamed_into_place_is_another_version_though_the_clock_stood_still(root, monkeypatch):
    folder = write_adapter(root / "alice", 1)
    (folder / "next").write_bytes(peft_files(2)[TENSOR_FILE])
    real_lstat = os.lstat

    def lstat_without_clock(path: str) -> SimpleNamespace:
        status = real_lstat(path)
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**fields | {"st_ctime_ns": 0, "st_mtime_ns": 0})

    monkeypatch.setattr(sources, "os", SimpleNamespace(**vars(os) | {"lstat": lstat_without_clock}))
    library = Library(root)
    before = library.locate("alice")
    assert library.locate("alice") == before
    (folder / "next").replace(folder / TENSOR_FILE)
    assert library.locate("alice") != before


def test_an_adapter_replaced_while_it_is_read_is_read_again(root, monkeypatch):
    """What was read half before and half after the change may look sound. It must not count."""
    folder = write_adapter(root / "alice", 1)
    half_old = load_peft(write_adapter(root.parent / "half-old", 12))
    library = Library(root)
    seeds = iter([2, 3])

    def replace_while_reading(path: Path, name: str, *, validated: bool) -> Adapter:
        if seed := next(seeds, None):
            write_adapter(folder, seed)
            return half_old
        return load_peft(path, name=name, validated=validated)

    monkeypatch.setattr(reader, "load_adapter", replace_while_reading)
    ref = library.locate("alice")
    with pytest.raises(AdapterNotFoundError, match="locate it again"):
        library.load(ref)
    assert library.load("alice").identity == load_peft(folder).identity
    assert library.identity(ref) is None


def test_repointing_while_eight_threads_load(root, tmp_path):
    want = {
        name: load_peft(write_adapter(root / name, seed)).identity for seed, name in enumerate(["v1", "v2"])
    }
    library = Library(root)
    library.point("live", "v1")
    early = library.locate("live")
    stop = threading.Event()

    def load_until_stopped() -> list[AdapterId]:
        seen = []
        while not stop.is_set():
            ref = library.locate("live")
            identity = library.load(ref).identity
            assert identity == want[Path(ref.location).name], "a ref gives what it says"
            seen += [identity, library.load("live").identity]
        return seen

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(load_until_stopped) for _ in range(8)]
        ends = time.monotonic() + 0.7
        while time.monotonic() < ends:
            for name in ("v2", "v1"):
                library.point("live", name)
                time.sleep(0.002)
        stop.set()
        seen = [identity for future in futures for identity in future.result()]
    assert set(seen) == set(want.values())
    library.point("live", "v2")
    assert library.load(early).identity == want["v1"]


def test_folders_replaced_while_threads_load_give_one_version_or_the_other(root, tmp_path):
    """The writer renames a new tensor file over the old: no load may see a mixture, or fail."""
    files = [peft_files(seed) for seed in (1, 2)]
    want = {identity_of(seed, tmp_path) for seed in (1, 2)}
    folder = write_files(root / "alice", files[0])
    library = Library(root)
    stop = threading.Event()

    def load_until_stopped() -> set[AdapterId]:
        seen = set()
        while not stop.is_set():
            seen.add(library.load("alice").identity)
        return seen

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(load_until_stopped) for _ in range(4)]
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:
            for version in files:
                (tmp_path / "aside").write_bytes(version[TENSOR_FILE])
                (tmp_path / "aside").replace(folder / TENSOR_FILE)
                time.sleep(0.02)
        stop.set()
        assert set().union(*(future.result() for future in futures)) == want


# Reading


class SlowReads:
    """Stands in for load_adapter: counts, and waits for `go` for one name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
        self.slow, self.names, self.started, self.go = (
            slow,
            list[str](),
            threading.Event(),
            threading.Event(),
        )
        monkeypatch.setattr(reader, "load_adapter", self)

    def __call__(self, folder: Path, name: str, *, validated: bool):
        self.names.append(name or "")
        if name == self.slow:
            self.started.set()
            assert self.go.wait(10)
        return load_peft(folder, name=name, validated=validated)


def test_threads_share_one_reading_and_others_do_not_wait(root, monkeypatch):
    for seed, name in enumerate(["alice", "bob"]):
        write_adapter(root / name, seed)
    library = Library(root)
    reads = SlowReads(monkeypatch, slow="alice")
    waiting = threading.Semaphore(0)

    class Awaited(Future[Adapter]):
        def result(self, timeout=None):
            waiting.release()
            return super().result(timeout)

    monkeypatch.setattr(reader, "Future", Awaited)
    ref = library.locate("alice")
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(library.load, ref) for _ in range(8)]
        assert reads.started.wait(10)
        for _ in range(7):  # one reads; whoever came after its end would rightly read again
            assert waiting.acquire(timeout=10)
        # While alice is being read, everything else goes on.
        assert library.load("bob").sites
        assert library.names() == ["alice", "bob"]
        library.point("carol", "alice")
        library.remove("carol")
        assert not any(future.done() for future in futures)
        reads.go.set()
        loaded = [future.result(10) for future in futures]
    assert reads.names == ["alice", "bob"]
    assert all(adapter is loaded[0] for adapter in loaded)
    assert library.load(ref) is not loaded[0], "weights are not kept"


def test_a_failed_reading_fails_for_all_who_share_it_and_then_is_forgotten(root):
    folder = write_adapter(root / "alice", 1)
    sound = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(sound[:-7])
    library = Library(root)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(library.load, "alice") for _ in range(4)]:
            with pytest.raises(AdapterFormatError):
                future.result()
    (folder / TENSOR_FILE).write_bytes(sound)
    assert library.load("alice").sites


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: (folder / TENSOR_FILE).write_bytes((folder / TENSOR_FILE).read_bytes()[:-1]),
            "truncated",
        ),
        (lambda folder: (folder / TENSOR_FILE).write_bytes(b""), TENSOR_FILE),
        (lambda folder: (folder / TENSOR_FILE).unlink(), f"has no {TENSOR_FILE}"),
        (lambda folder: (folder / TENSOR_FILE).rename(folder / "adapter_model.bin"), "never read"),
        (lambda folder: (folder / CONFIG_FILE).write_bytes(b"{"), CONFIG_FILE),
    ],
    ids=["truncated", "empty", "missing", "pickle", "config cut"],
)
def test_a_damaged_adapter_is_refused_and_leaves_the_others_alone(root, damage, says):
    for seed, name in enumerate(["alice", "bob"]):
        write_adapter(root / name, seed)
    library = Library(root)
    assert library.load("alice").sites
    damage(root / "alice")
    with pytest.raises(AdapterFormatError, match=says):
        library.load("alice")
    assert library.names() == ["alice", "bob"]
    assert library.load("bob").sites


def test_an_adapter_that_cannot_be_read_now_can_be_later(root, monkeypatch):
    folder = write_adapter(root / "alice", 1)
    library = Library(root)
    opened = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == TENSOR_FILE:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(AdapterUnavailableError, match=f"{folder}/{TENSOR_FILE}' .*Permission denied"):
            library.load("alice")
    assert library.load("alice").sites


def test_limits_are_checked_before_weights_are_read(root, tmp_path, monkeypatch):
    write_adapter(root / "small", 1, rank=4)
    write_adapter(root / "large", 1, rank=8)
    large = load_peft(root / "large")
    num_bytes = (root / "large" / TENSOR_FILE).stat().st_size
    assert Library(root, max_rank=8, max_bytes=num_bytes).load("large").ranks == {SITE: 8}

    def refuse_to_read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    cases = [
        (Library(root, max_rank=7), rf"rank 8 at site '{SITE}'.*up to 7"),
        (Library(root, max_bytes=num_bytes - 1), rf"{num_bytes:,} bytes.*up to {num_bytes - 1:,}"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(reader, "load_adapter", refuse_to_read)
        for library, says in cases:
            with pytest.raises(AdapterFormatError, match=says):
                library.load("large")
            with pytest.raises(AssertionError, match="weights were read"):
                library.load("small")
    for library, _ in cases[:1]:
        assert library.load("small").sites
        with pytest.raises(AdapterFormatError, match="rank 8"):
            library.add("memory", large)
    with pytest.raises(AdapterFormatError, match="bytes of weights"):
        Library(max_bytes=large.num_bytes - 1).add("memory", large)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (["absent-folder"], {}, "absent-folder"),
        ([""], {}, "not a folder"),
        ([], {"max_rank": 0}, "max_rank"),
        ([], {"max_bytes": -1}, "max_bytes"),
        ([], {"max_cache_bytes": 0}, "max_cache_bytes"),
        ([], {"storage_options": {"s3://typo": {}}}, "s3://typo"),
    ],
)
def test_settings_are_checked(arguments, options, says):
    with pytest.raises(ConfigError, match=says):
        Library(*arguments, **options)


def test_a_library_without_roots_holds_what_is_added(tmp_path):
    library = Library()
    assert library.names() == []
    with pytest.raises(AdapterError, match="holds 0 names"):
        library.load("alice")
    library.add("alice", load_peft(write_adapter(tmp_path / "a", 1)))
    assert library.names() == ["alice"]


def test_an_identity_may_be_found_out_beside_other_things(root):
    write_adapter(root / "one", seed=1)
    known = Library(root).load("one").identity
    library, gate = Library(root), threading.Event()
    ref = library.locate("one")

    def hold_checkers() -> None:
        for _ in range(reader.MAX_CHECKERS):
            library._reader._checkers.submit(gate.wait, 30)

    hold_checkers()
    try:
        adapter = library.load(ref, checked=False)
        assert library.identity(ref) is None
        gate.set()
        assert adapter.identity == known
        assert library.identity(ref) == known

        gate.clear()
        hold_checkers()
        again = library.load(ref, checked=False)
        assert library.identity(ref) == known, "what is known stays so while it is read again"
    finally:
        gate.set()
    assert again.identity == known


def test_what_is_found_beside_other_things_is_told_to_whoever_asks_for_the_identity(root):
    sound = load_peft(write_adapter(root / "one", seed=1))
    pair = sound.sites[SITE]
    pair.lora_b[0, 0] = torch.nan
    tensors = {
        f"base_model.model.{SITE}.lora_{half}.weight": getattr(pair, f"lora_{half.lower()}").contiguous()
        for half in "AB"
    }
    save_file(tensors, root / "one" / TENSOR_FILE)
    library = Library(root)
    ref = library.locate("one")
    adapter = library.load(ref, checked=False)
    for _ in range(2):
        with pytest.raises(AdapterFormatError, match=r"'one'.*NaN or Inf"):
            _ = adapter.identity
    assert library.identity(ref) is None
    with pytest.raises(AdapterFormatError, match=r"'one'.*NaN or Inf"):
        library.load(ref)
