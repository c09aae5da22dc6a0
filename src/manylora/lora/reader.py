"""Reads what a ref names: within the limits, each ref once at a time. Knows no names, keeps no weights."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from manylora.errors import AdapterFormatError, AdapterNotFoundError
from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.convert import load_adapter, peek_adapter
from manylora.lora.names import quoted
from manylora.lora.sources import Found, Source

MAX_KNOWN_IDENTITIES = 65_536
MAX_CHECKERS = 4
"""Threads that look at values and find identities out."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a name pointed at when it was located. Loading it gives that or an error, never anything else.

    One change is not seen: a file rewritten in place, to the same size, within one tick of the file
    system's clock. Whoever writes adapters should write aside and rename.
    """

    name: str
    kind: Literal["memory", "folder", "remote"]
    location: str
    """The folder or file with all links resolved, or the URL; empty for an adapter in memory."""

    version: str
    """Of the files at `location`; of an adapter in memory, its identity."""

    num_bytes: int
    """Size of the weights."""

    adapter: Adapter | None = field(default=None, compare=False, repr=False)
    """The adapter itself if it is in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a library takes. None: any."""

    max_rank: int | None = None
    """Largest rank at any site."""

    max_bytes: int | None = None
    """Largest size of the weights."""

    def check_bytes(self, name: str, num_bytes: int) -> None:
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise AdapterFormatError(
                f"adapter {quoted(name)} has {num_bytes:,} bytes of weights; this library takes up to "
                f"{self.max_bytes:,} (max_bytes)"
            )

    def check_ranks(self, name: str, ranks: Mapping[str, int]) -> None:
        site, rank = max(ranks.items(), key=lambda item: item[1], default=("", 0))
        if self.max_rank is not None and rank > self.max_rank:
            raise AdapterFormatError(
                f"adapter {quoted(name)} has rank {rank} at site '{site}'; this library takes up to "
                f"{self.max_rank} (max_rank)"
            )


class Reader:
    """Loads refs from their roots. Threads that ask for the same ref at once share one reading."""

    def __init__(self, sources: Sequence[Source], limits: Limits) -> None:
        self._sources = sources
        self._limits = limits
        # Held for dictionary look-ups only, never while a file is read or fetched.
        self._lock = threading.Lock()
        self._reading: dict[AdapterRef, Future[Adapter]] = {}
        self._checkers = ThreadPoolExecutor(MAX_CHECKERS, "adapter-checker")
        self._identities: OrderedDict[tuple[str, str], AdapterId] = OrderedDict()  # by (location, version)

    def load(self, ref: AdapterRef, *, checked: bool = True) -> Adapter:
        """Read and validate what `ref` names; arguments and errors as in `Library.load`."""
        adapter = self._load(ref)
        if checked:
            _ = adapter.identity
        return adapter

    def _load(self, ref: AdapterRef) -> Adapter:
        if ref.adapter is not None:
            return ref.adapter
        mine: Future[Adapter] = Future()
        with self._lock:
            future = self._reading.setdefault(ref, mine)
        if future is mine:
            try:
                mine.set_result(self._read(ref))
            except BaseException as error:  # whatever it was, the other threads must not wait for ever
                mine.set_exception(error)
            finally:
                with self._lock:
                    del self._reading[ref]
        return future.result()

    def identity(self, ref: AdapterRef) -> AdapterId | None:
        """Return the identity of what `ref` names if it is known without reading or hashing."""
        if ref.adapter is not None:
            return ref.adapter.identity
        with self._lock:
            return self._identities.get((ref.location, ref.version))

    def _read(self, ref: AdapterRef) -> Adapter:
        self._limits.check_bytes(ref.name, ref.num_bytes)
        with self._source_of(ref).open(ref.name, Found(ref.location, ref.version, ref.num_bytes)) as path:
            if self._limits.max_rank is not None:
                self._limits.check_ranks(ref.name, peek_adapter(path).ranks)
            adapter = load_adapter(path, name=ref.name, validated=False)
        adapter.begin_checks(self._checkers, partial(self._note, ref))
        return adapter

    def _note(self, ref: AdapterRef, identity: AdapterId) -> None:
        with self._lock:
            self._identities[ref.location, ref.version] = identity
            if len(self._identities) > MAX_KNOWN_IDENTITIES:
                self._identities.popitem(last=False)

    def _source_of(self, ref: AdapterRef) -> Source:
        for source in self._sources:
            if source.kind == ref.kind and source.name_of(ref.location) is not None:
                return source
        raise AdapterNotFoundError(
            f"adapter {quoted(ref.name)} is not below a root of this library; locate it again"
        )
