"""The library: adapters by name. A name is an alias that can be pointed elsewhere. Knows no page."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

from manylora.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ConfigError,
)
from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.downloads import DownloadCache
from manylora.lora.listing import Listing
from manylora.lora.names import check_name, near_matches, quoted
from manylora.lora.reader import AdapterRef, Limits, Reader
from manylora.lora.remote import RemoteSource
from manylora.lora.sources import Found, LocalSource, Source

MAX_LOAD_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class _Place:
    """A name below one root."""

    listing: Listing
    name: str


_Target: TypeAlias = Adapter | _Place


class Library:
    """Adapters below some roots, and in memory, by name.

    A name is a path below a root: "alice", "team/alice"; of an adapter in one file, without ".safetensors". If
    several roots hold it, the first one counts; what was added or pointed comes before them all. Nothing outside of
    the roots is read, whatever a name or a link says.

    Any thread may call any method. Creating a library reads nothing; the first file is opened by `load`.
    """

    def __init__(
        self,
        *roots: str | Path,
        cache_dir: str | Path | None = None,
        max_cache_bytes: int | None = None,
        storage_options: Mapping[str, Mapping[str, Any]] | None = None,
        max_rank: int | None = None,
        max_bytes: int | None = None,
        suggests: bool = True,
        resolve_timeout_s: float | None = None,
        fetch_timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            roots: local folders and URLs that fsspec knows: s3://bucket/prefix, https://host/path, hf://org.
            cache_dir: where remote adapters are copied to; by default in the user's cache folder.
            max_cache_bytes: beyond this, copies that were not used for longest are removed. None: never.
            storage_options: for a root as given, what its file system is told: credentials, timeouts.
            max_rank: adapters with a larger rank are refused before their weights are read.
            max_bytes: adapters with larger weights are refused before they are read or fetched.
            suggests: say which names are near one that does not exist. With thousands that takes milliseconds, which
                strangers should not be able to ask for, and tells them names.
            resolve_timeout_s: longest that a remote root may take to say whether it holds a name. None: as long as its
                file system lets it.
            fetch_timeout_s: longest that a remote root may take to send an adapter. None: likewise.
        """
        options = dict(storage_options or {})
        if unknown := options.keys() - {os.fspath(root) for root in roots}:
            raise ConfigError(f"storage_options for {sorted(unknown)}, which are no roots of this library")
        for cap, value in {
            "max_cache_bytes": max_cache_bytes,
            "max_rank": max_rank,
            "max_bytes": max_bytes,
        }.items():
            if value is not None and value < 1:
                raise ConfigError(f"{cap} must be at least 1, got {value}")
        for limit, seconds in {
            "resolve_timeout_s": resolve_timeout_s,
            "fetch_timeout_s": fetch_timeout_s,
        }.items():
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"{limit} must be above 0, got {seconds}")

        def source_of(root: str | Path) -> Source:
            if "://" not in os.fspath(root):
                return LocalSource(root)
            cache = DownloadCache(Path(cache_dir or _default_cache_dir()), max_cache_bytes)
            told = options.get(str(root), {})
            return RemoteSource(str(root), told, cache, resolve_timeout_s, fetch_timeout_s)

        self._suggests = suggests
        self._limits = Limits(max_rank=max_rank, max_bytes=max_bytes)
        self._listings = [Listing(source_of(root)) for root in roots]
        self._reader = Reader([listing.source for listing in self._listings], self._limits)
        self._lock = threading.Lock()  # held for dictionary look-ups only
        self._pointed: dict[str, _Target | None] = {}  # None: removed, though a root may hold it

    @property
    def prefixes(self) -> frozenset[str]:
        """What paths and URLs below the roots begin with, links resolved and not: messages hold them."""
        folders = {listing.source.folder for listing in self._listings}
        folders |= {os.path.realpath(folder) for folder in folders}
        urls = {listing.source.url_prefix for listing in self._listings}
        return frozenset({f"{folder}/" for folder in folders} | (urls - {""}))

    def names(self) -> list[str]:
        """Return all names, sorted. The roots are listed at the first call and after `refresh`.

        Raises:
            AdapterUnavailableError: a remote root cannot be reached.
        """
        return sorted(self._visible(set().union(*(listing.names() for listing in self._listings))))

    def known_names(self) -> list[str]:
        """Return the names as far as they can be had without asking a remote root, sorted."""
        return sorted(self._visible(set().union(*(listing.known_names() for listing in self._listings))))

    def list_anew(self, timeout_s: float) -> list[AdapterUnavailableError]:
        """List all roots at once; returns why a root could not be listed in time, whose names stay as they were known.

        One that takes longer goes on, and its names are known when it is done.
        """
        end, errors = monotonic() + timeout_s, []
        readings = [(listing.source.label, listing.read_anew()) for listing in self._listings]
        for label, reading in readings:
            try:
                reading.result(max(0.0, end - monotonic()))
            except AdapterUnavailableError as error:
                errors.append(error)
            except TimeoutError:
                message = f"adapter root '{label}' could not list its names within {timeout_s:g} s"
                errors.append(AdapterUnavailableError(message))
        return errors

    def refresh(self) -> None:
        """List the roots anew at the next call of `names`. `locate` looks at what is there now anyway."""
        for listing in self._listings:
            listing.forget()

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        """Whether `locate` finds the name, be its files sound or not."""
        try:
            return self._look_up(name) is not None  # type: ignore[arg-type]  # check_name refuses what is no str
        except AdapterNotFoundError:
            return False
        except AdapterFormatError:
            return True

    def locate(self, name: str) -> AdapterRef:
        """Return what the name points at now. Opens no file; a remote root is asked.

        Raises:
            AdapterNotFoundError: no such name; says which are near.
            AdapterFormatError: a folder or object of that name that is no adapter.
            AdapterUnavailableError: a remote root cannot be reached, or a file not be looked at.
        """
        target, found = self._look_up(name)
        if isinstance(target, Adapter):
            return AdapterRef(name, "memory", "", target.identity, target.num_bytes, target)
        assert found is not None
        return _ref(name, target, found)

    def locate_at(self, path: str | Path) -> AdapterRef:
        """Return what lies at a path or URL below a root now, whatever names point at; errors as of `locate`."""
        place = self._place_at(path)
        found = place.listing.source.find(place.name)
        if found is None:
            raise self._not_found(place.name)
        return _ref(place.name, place, found)

    def load(self, name_or_ref: str | AdapterRef, *, checked: bool = True) -> Adapter:
        """Read and validate what a name points at now, or what it did when it was located.

        Threads that load the same ref at once share one reading.

        Args:
            checked: False returns while another thread still looks at the values and finds out the identity, for a
                caller with other things to do before asking the adapter for it, who is then told what is wrong;
                `identity` of this library is None until then.
        Raises:
            AdapterNotFoundError: no such name; or what the ref names was replaced or removed since.
            AdapterFormatError: the files are no adapter that can be read, or exceed a limit.
            AdapterUnavailableError: a file cannot be read now, or a remote adapter not be fetched or stored.
        """
        if isinstance(name_or_ref, AdapterRef):
            return self._reader.load(name_or_ref, checked=checked)
        for attempt in range(1, MAX_LOAD_ATTEMPTS + 1):
            ref = self.locate(name_or_ref)
            try:
                return self._reader.load(ref, checked=checked)
            except AdapterError:
                # Replaced while it was read? Then what is there now counts.
                if attempt == MAX_LOAD_ATTEMPTS or self.locate(name_or_ref) == ref:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def identity(self, ref: AdapterRef) -> AdapterId | None:
        """Return the identity of what `ref` names if this library has loaded it before, and checked it, else None."""
        return self._reader.identity(ref)

    def add(self, name: str, adapter: Adapter | str | Path) -> None:
        """Give a name to an adapter in memory, or to the path or URL of one below a root.

        Raises:
            AdapterNotFoundError: the name cannot be one, or no root holds an adapter at that path.
            AdapterFormatError: the adapter is not valid, or exceeds a limit.
        """
        check_name(name)
        if isinstance(adapter, Adapter):
            adapter.validate()
            self._limits.check_bytes(name, adapter.num_bytes)
            self._limits.check_ranks(name, adapter.ranks)
        self._point(name, adapter if isinstance(adapter, Adapter) else self._place_at(adapter))

    def point(self, name: str, target: str | Path) -> None:
        """Point a name, new or not, at what another name points at now, or at a path or URL below a root.

        A `str` is a name unless it is an absolute path or a URL. Refs handed out before keep what they had.

        Raises:
            AdapterNotFoundError: the name cannot be one, or there is no such target.
        """
        check_name(name)
        is_name = isinstance(target, str) and not os.path.isabs(target) and "://" not in target
        self._point(name, self._look_up(str(target))[0] if is_name else self._place_at(target))

    def remove(self, name: str) -> None:
        """Forget a name. Files stay; what a root holds under it is hidden until added or pointed again.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            is_pointed = self._pointed.get(name) is not None
        if not is_pointed and name not in self:
            raise self._not_found(name)
        self._point(name, None)
        # Where no root holds it there is nothing to hide, and names that come and go shall not pile up.
        if is_pointed and not any(_may_hold(listing.source, name) for listing in self._listings):
            with self._lock:
                if self._pointed.get(name) is None:
                    self._pointed.pop(name, None)

    def _point(self, name: str, target: _Target | None) -> None:
        with self._lock:
            self._pointed[name] = target

    def _look_up(self, name: str) -> tuple[_Target, Found | None]:
        """Return where a name leads, and what a root holds there now (None for an adapter in memory)."""
        check_name(name)
        with self._lock:
            target = self._pointed.get(name)
            is_removed = target is None and name in self._pointed
        if isinstance(target, Adapter):
            return target, None
        everywhere = [] if is_removed else [_Place(listing, name) for listing in self._listings]
        for place in [target] if target else everywhere:
            found = place.listing.source.find(place.name)
            place.listing.note(place.name, found is not None)
            if found is not None:
                return place, found
        raise self._not_found(name)

    def _place_at(self, path: str | Path) -> _Place:
        location = os.fspath(path)
        location = location if "://" in location else os.path.abspath(location)
        for listing in self._listings:
            name = listing.source.name_of(location)
            if name is not None:
                check_name(name)
                if listing.source.find(name) is not None:
                    return _Place(listing, name)
        # The same text for every path outside: it tells nothing of what lies there.
        raise AdapterNotFoundError(
            f"{quoted(os.fspath(path))} is not an adapter below a root of this library"
        )

    def _visible(self, listed: set[str]) -> set[str]:
        """What is left of the names that the roots list, and what was added to them."""
        with self._lock:
            removed = {name for name, target in self._pointed.items() if target is None}
            return (listed | self._pointed.keys()) - removed

    def _not_found(self, name: str) -> AdapterNotFoundError:
        if not self._suggests:
            return AdapterNotFoundError(f"no adapter {quoted(name)} in this library")
        known = self._visible(set().union(*(listing.known_names() for listing in self._listings))) - {name}
        near = near_matches(name, known)
        hint = f" Did you mean {' or '.join(map(quoted, near))}?" if near else ""
        unlisted = [listing.source.label for listing in self._listings if not listing.is_known]
        beside = f", not counting {', '.join(unlisted)}" if unlisted else ""
        return AdapterNotFoundError(
            f"no adapter {quoted(name)} in this library, which holds {len(known):,} names{beside}.{hint}"
        )


def _may_hold(source: Source, name: str) -> bool:
    try:
        return source.find(name) is not None
    except AdapterError:  # it cannot say, or holds something that is no adapter
        return True


def _ref(name: str, place: _Place, found: Found) -> AdapterRef:
    return AdapterRef(name, place.listing.source.kind, found.location, found.version, found.num_bytes)


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manylora" / "adapters"
