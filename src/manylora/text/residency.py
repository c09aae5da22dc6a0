"""Which adapters shall stay in the pool, and which shall leave it, whatever is idle for how long.

Orders are given on any thread and carried out on the engine's, in `take_in` and `settle`. Knows no sequence.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from manylora.errors import AdapterError, CapacityError
from manylora.lora.adapter import AdapterId
from manylora.lora.library import Library
from manylora.lora.reader import AdapterRef
from manylora.memory.unified import UnifiedMemory
from manylora.text.loader import AdapterLoader
from manylora.text.scheduler import Scheduler
from manylora.text.sequence import AdapterKey


@dataclass(frozen=True, slots=True)
class ResidentInfo:
    """An adapter that has pages."""

    identity: AdapterId
    names: tuple[str, ...]
    """Names that meant it when they were last asked for, sorted."""
    num_bytes: int
    """Of the pool."""
    is_ready: bool
    """False while its bytes are being copied."""
    is_pinned: bool
    num_users: int
    """Sequences that hold it."""


def _promise() -> "Future[Any]":
    promise: Future[Any] = Future()
    promise.set_running_or_notify_cancel()  # nobody who waits for it can take it back
    return promise


@dataclass(frozen=True, eq=False, slots=True)
class _Pin:
    """A name to be pinned; demands its adapter of the loader as a request does."""

    name: str
    adapters: tuple[tuple[AdapterKey, float], ...]
    done: "Future[None]" = field(default_factory=_promise)


@dataclass(frozen=True, eq=False, slots=True)
class _Eviction:
    adapter: AdapterRef | AdapterId
    done: "Future[int]" = field(default_factory=_promise)

    def identity(self, library: Library) -> AdapterId | None:
        """By content; None where that was never read, so that nothing of it can be in the pool."""
        return library.identity(self.adapter) if isinstance(self.adapter, AdapterRef) else self.adapter


class Residency:
    """Pins by name, evictions by content, and the list of what is there."""

    def __init__(
        self,
        library: Library,
        loader: AdapterLoader,
        scheduler: Scheduler,
        memory: UnifiedMemory,
        page_bytes: int,
    ) -> None:
        self._library = library
        self._loader = loader
        self._scheduler = scheduler
        self._memory = memory
        self._page_bytes = page_bytes
        self._named: dict[str, AdapterRef] = {}  # what each name meant when it was last asked for
        self._orders: deque[Callable[[], None]] = deque()
        self._pinned: dict[str, AdapterId] = {}
        self._pins: list[_Pin] = []  # whose adapters are on their way
        self._evictions: list[_Eviction] = []  # whose adapters are still in use

    # -- on any thread

    @property
    def has_work(self) -> bool:
        return bool(self._orders or self._pins or self._evictions)

    def note(self, ref: AdapterRef) -> None:
        """Remember what a name means."""
        self._named[ref.name] = ref

    def pin(self, name: str) -> "Future[None]":
        """Keep what a name points at now, loading it if it is not there. Errors of loading come by the future."""
        ref = self._library.locate(name)
        self.note(ref)
        pin = _Pin(name, ((ref, 1.0),))
        self._loader.demand(pin, is_urgent=True)  # no queue that the scheduler orders has it
        self._orders.append(partial(self._pins.append, pin))
        return pin.done

    def unpin(self, name: str) -> None:
        """Take back `pin(name)`, whatever the name points at by now."""
        self._orders.append(partial(self._take_back, name))

    def unload(self, name: str) -> "Future[int]":
        """Take the name out of the library, and its pin; then evict what it meant when it was last asked for."""
        self._library.remove(name)
        self.unpin(name)
        ref = self._named.pop(name, None)
        if ref is None:
            return _finished(0)
        return self.evict(ref)

    def evict(self, adapter: AdapterRef | AdapterId) -> "Future[int]":
        """Free the pages of an adapter as soon as nobody uses it; gives the bytes given back.

        0 if it has none, or is to stay: it is pinned, or a name that was asked for points at it.
        """
        eviction = _Eviction(adapter)
        identity = eviction.identity(self._library)
        if identity is not None and any(map(self._still_means, self._refs_of(identity))):
            return _finished(0)
        self._orders.append(partial(self._evictions.append, eviction))
        return eviction.done

    def residents(self) -> list[ResidentInfo]:
        """Every adapter that has pages, the one that came first at the front."""
        names: dict[AdapterId, list[str]] = {}
        for name, ref in sorted(self._named.copy().items()):
            identity = self._library.identity(ref)
            if identity is not None:
                names.setdefault(identity, []).append(name)
        return [
            ResidentInfo(
                identity=AdapterId(one.adapter_id),
                names=tuple(names.get(AdapterId(one.adapter_id), ())),
                num_bytes=one.num_pages * self._page_bytes,
                is_ready=one.is_ready,
                is_pinned=one.is_pinned,
                num_users=one.num_users,
            )
            for one in self._memory.adapters.residents()
        ]

    # -- on the engine's thread

    def take_in(self, failures: Mapping[AdapterKey, Exception]) -> None:
        """Carry out what was ordered since the last step, and pin what has arrived.

        Args:
            failures: adapters that could not be read, with the reasons.
        """
        while self._orders:
            self._orders.popleft()()
        for pin in list(self._pins):
            ((key, _),) = pin.adapters
            error = failures.get(key)
            try:
                if error is None and not self._try(pin, key):
                    continue
            except CapacityError as too_large:
                error = too_large
            self._end(pin, error)

    def settle(self) -> None:
        """Free the pages of evicted adapters whose last user is gone."""
        for eviction in list(self._evictions):
            num_bytes = self._evict(eviction)
            if num_bytes is not None:
                self._evictions.remove(eviction)
                eviction.done.set_result(num_bytes)

    def _try(self, pin: _Pin, key: AdapterKey) -> bool:
        """Take a pin a step further; True when it holds."""
        adapters = self._memory.adapters
        found = self._loader.lookup(key)
        if found is None:
            return False
        identity, num_pages = found
        if not adapters.is_pinned(identity):
            left = self._memory.pool.num_pages - adapters.num_pinned_pages
            if num_pages > left:
                raise CapacityError(
                    f"adapter '{pin.name}' takes {num_pages} pages and cannot be pinned: of the pool's "
                    f"{self._memory.pool.num_pages}, {left} are not pinned; unpin others, or give the pool more memory"
                )
            if not self._scheduler.could_spare(identity, num_pages):
                return False
        if adapters.pages(identity) is None and self._memory.can_alloc(num_pages):
            self._loader.place(identity, self._memory.alloc(num_pages))
        if not adapters.is_ready(identity):
            return False
        self._unpin(pin.name)
        self._pinned[pin.name] = identity
        adapters.pin(identity)
        return True

    def _take_back(self, name: str) -> None:
        """The pin of a name, and those for it whose adapter is still on its way."""
        for pin in [pin for pin in self._pins if pin.name == name]:
            self._end(pin, AdapterError(f"the pin of '{name}' was taken back before the adapter was there"))
        self._unpin(name)

    def _end(self, pin: _Pin, error: Exception | None) -> None:
        self._pins.remove(pin)
        self._loader.release(pin)
        if error is None:
            pin.done.set_result(None)
        else:
            pin.done.set_exception(error)

    def _unpin(self, name: str) -> None:
        identity = self._pinned.pop(name, None)
        if identity is not None and identity not in self._pinned.values():
            self._memory.adapters.unpin(identity)

    def _evict(self, eviction: _Eviction) -> int | None:
        """Return the bytes given back; None while somebody uses the adapter."""
        adapters = self._memory.adapters
        identity = eviction.identity(self._library)  # once: it may become known at any moment
        if self._loader.is_demanded(identity or eviction.adapter):
            return None
        pages = None if identity is None else adapters.pages(identity)
        if identity is None or pages is None or adapters.is_pinned(identity):
            return 0
        if not adapters.is_ready(identity):
            return None  # its bytes are still being written
        adapters.drop(identity)
        return len(pages) * self._page_bytes

    def _refs_of(self, identity: AdapterId) -> list[AdapterRef]:
        return [ref for ref in self._named.copy().values() if self._library.identity(ref) == identity]

    def _still_means(self, ref: AdapterRef) -> bool:
        try:
            return self._library.locate(ref.name) == ref
        except AdapterError:
            return False


def _finished(num_bytes: int) -> "Future[int]":
    done = _promise()
    done.set_result(num_bytes)
    return done
