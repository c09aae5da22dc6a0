"""Brings adapters from the library to the pool, beside compute.

    demanded -> reading (threads) -> image in host memory -> copying (thread) -> ready

Requests demand what they name when they come, from any thread, and the demand ends with them. Everything but the
reading and copying itself happens inside `poll`, `lookup` and `place`, on the engine's thread.

Images wait for pages, so only so many are made. They are given to whole requests: were all of them parts of mixtures
whose other parts find no room, no request could ever start. Whose turn comes next is read for first, as the scheduler
says with `prefer`, then the oldest: else one tenant's long queue would keep everybody's adapters from being read.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain
from threading import RLock
from time import monotonic
from typing import Any, Protocol

from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.library import Library
from manylora.lora.reader import AdapterRef
from manylora.memory.adapter_cache import AdapterCache
from manylora.memory.pages import PageId
from manylora.models.adapter_pages import AdapterImage, AdapterPages, ResidentAdapter
from manylora.text.sequence import AdapterKey

LOAD_WEIGHT = 0.2
"""Of the newest reading in the average of how long readings take."""


class Demand(Protocol):
    """Who wants adapters: a request."""

    @property
    def adapters(self) -> Sequence[tuple[AdapterKey, float]]: ...

    def __hash__(self) -> int: ...


class AdapterLoader:
    """The scheduler's supply of adapters."""

    def __init__(
        self,
        library: Library,
        pages: AdapterPages,
        cache: AdapterCache,
        check_fits: Callable[[Adapter], None],
        *,
        max_pending: int,
        num_threads: int,
    ) -> None:
        """
        Args:
            check_fits: raises AdapterMismatchError for an adapter of another model.
            max_pending: most adapters being read or read and waiting for pages; more only where the first request
                alone needs more, or the first after those that are urgent.
        """
        self.resident: dict[AdapterId, ResidentAdapter] = {}
        self._library = library
        self._pages = pages
        self._cache = cache
        self._check_fits = check_fits
        self._max_pending = max_pending
        # Guards what `demand` touches, which any thread may call.
        self._lock = RLock()
        self._demand: dict[Demand, None] = {}  # in the order in which they came
        self._urgent: dict[Demand, None] = {}  # those of them that come before all others
        self._preferred: Sequence[Demand] = ()
        self._let_in: list[Demand] = []  # for whom there is room in `_due`
        self._due: dict[Hashable, AdapterKey] = {}
        """What may be read, or read and waiting, now: what those who come first lack, while there is room."""
        self._is_full = False  # somebody who came before the next one to come found no room in `_due`
        self._has_changed = False
        self._residency = cache.residency
        self._reading: dict[AdapterKey, Future[AdapterImage]] = {}
        self._images: dict[AdapterId, AdapterImage] = {}
        self._copying: dict[AdapterId, Future[ResidentAdapter]] = {}
        self._read_s = 0.0  # how long a reading takes, the last ones counting most
        self._readers = ThreadPoolExecutor(num_threads, "adapter-reader")
        # Apart from the readers: a copy into the pool takes milliseconds and must not wait for a slow disk.
        self._copier = ThreadPoolExecutor(1, "adapter-copier")

    def demand(self, request: Demand, *, is_urgent: bool = False) -> None:
        """A request wants its adapters. Reading begins now unless enough are on their way.

        Args:
            is_urgent: it comes before all that are preferred.
        """
        with self._lock:
            self._demand[request] = None
            if is_urgent:
                self._urgent[request] = None
                self._has_changed |= self._is_full
            # Whoever finds `_due` out of date or full comes last: `poll` sees to it in its turn.
            if not self._is_stale() and (not self._is_full or self._only_urgent()):
                self._start_reading(self._add_to_due(request))

    def release(self, request: Demand) -> None:
        """The request has ended."""
        with self._lock:
            del self._demand[request]
            self._urgent.pop(request, None)
            # One whose adapters are all in the pool, as of all that ran, took no part in what is due.
            if self._absent(_keys(request)):
                self._has_changed = True

    def prefer(self, requests: Sequence[Demand]) -> None:
        """Read first for these, the first of them first, until told otherwise. What is being read already is kept."""
        with self._lock:
            if requests != self._preferred:
                self._preferred = requests
                # Unless somebody found no room, all are being read for, and their order is of no account.
                if self._is_full:
                    self._renew_due()

    def is_demanded(self, adapter: AdapterKey) -> bool:
        """Whether a request that has not ended wants an adapter, named by reference or identity."""
        wanted = {adapter}
        if isinstance(adapter, AdapterRef):
            wanted.add(self._library.identity(adapter))
        wanted.discard(None)
        with self._lock:
            keys = {key for request in self._demand for key, _ in request.adapters}
        return any(key in wanted or self._library.identity(_ref(key)) in wanted for key in keys)

    def load_s(self, request: Demand) -> float:
        """How long, by experience, the adapters of a request take from its coming on; 0 if they are in the pool."""
        identities = (self._library.identity(_ref(key)) for key, _ in request.adapters)
        if all(identity is not None and self._cache.is_ready(identity) for identity in identities):
            return 0.0
        return self._read_s

    def poll(self) -> dict[AdapterKey, Exception]:
        """Take in what has been read and copied, begin what is due; return what could not be read, with the reason."""
        with self._lock:
            failures = self._take_images()
            self._take_copies()
            if self._is_stale():
                self._renew_due(failures)
        return failures

    def lookup(self, key: AdapterKey) -> tuple[AdapterId, int] | None:
        """Identity and pages of an adapter that is resident, or read and ready to be; None while it is on its way."""
        identity = self._library.identity(_ref(key))
        if identity is None:
            return None
        pages = self._cache.pages(identity)
        if pages is not None:
            return identity, len(pages)
        image = self._images.get(identity)
        return None if image is None else (identity, image.num_pages)

    def place(self, identity: AdapterId, pages: list[PageId]) -> None:
        """Begin to copy an adapter that has been read into these pages, which are the cache's from now on."""
        with self._lock:
            self._cache.insert(identity, pages)
            image = self._images.pop(identity)
            self._copying[identity] = self._copier.submit(self._pages.write, image, pages)

    def wait(self, timeout_s: float) -> bool:
        """Wait until something on its way arrives, at most so long; False if nothing is on its way."""
        with self._lock:
            futures: list[Future[Any]] = [*self._reading.values(), *self._copying.values()]
        wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED)
        return bool(futures)

    def close(self) -> None:
        """Stop the threads; what is being read or copied is finished first."""
        self._readers.shutdown(cancel_futures=True)
        self._copier.shutdown(cancel_futures=True)

    def _take_images(self) -> dict[AdapterKey, Exception]:
        failures: dict[AdapterKey, Exception] = {}
        for key in [key for key, future in self._reading.items() if future.done()]:
            future = self._reading.pop(key)
            self._has_changed = True
            error = future.exception()
            # In either case another name of the same content may have been quicker.
            if error is None:
                image = future.result()
                if self._cache.pages(image.identity) is None:
                    self._images[image.identity] = image
            elif self.lookup(key) is None:
                assert isinstance(error, Exception)
                failures[key] = error
        return failures

    def _take_copies(self) -> None:
        for identity in [identity for identity, copy in self._copying.items() if copy.done()]:
            self.resident[identity] = self._copying.pop(identity).result()
            self._cache.mark_ready(identity)

    def _is_stale(self) -> bool:
        """Whether `_due` may differ from what it was: the queue is long, and most steps change nothing of it."""
        return self._has_changed or self._residency != self._cache.residency

    def _renew_due(self, failures: Collection[AdapterKey] = ()) -> None:
        """Find what is due, read it but for what has just failed, and forget the rest."""
        self._find_due()
        self._forget_all_but_due()
        self._start_reading({what: key for what, key in self._due.items() if key not in failures})
        # What failed is read again if somebody still wants it when the engine has ended those who did.
        self._has_changed = bool(failures)

    def _find_due(self) -> None:
        begun, preferred = self._begun(), [one for one in self._preferred if one in self._demand]
        self._due, self._let_in, self._is_full = {}, [], False
        self._residency = self._cache.residency
        seen: set[AdapterKey] = set()
        for request in chain(self._urgent, begun, preferred, self._demand):
            keys = [key for key, _ in request.adapters if key not in seen]
            seen.update(keys)
            if keys:
                self._add_to_due(request)
            if self._is_full and not self._only_urgent():
                return

    def _begun(self) -> list[Demand]:
        """Those preferred for whom reading has begun. Turns change faster than adapters are read: were each reading
        dropped for another whose turn has come since, none might ever be of use."""
        preferred = set(self._preferred)
        running = {key for key, future in self._reading.items() if future.running()}
        begun = self._absent(running).keys() | self._images.keys()
        return [
            one
            for one in self._let_in
            if one in preferred and one in self._demand and begun & self._absent(_keys(one)).keys()
        ]

    def _add_to_due(self, request: Demand) -> dict[Hashable, AdapterKey]:
        """Let a whole request in, or nobody any more; returns what it lacks, {} where it was not let in."""
        absent = self._absent(_keys(request))
        is_first = not self._due or (request not in self._urgent and self._only_urgent())
        if not is_first and len(self._due | absent) > self._max_pending:
            self._is_full = True
            return {}
        self._due |= absent
        if absent:
            self._let_in.append(request)
        return absent

    def _only_urgent(self) -> bool:
        """Whether nobody but those who are urgent was let in. One more always is: they may have to wait for requests
        that began to answer, and these for adapters that were evicted since."""
        return all(one in self._urgent for one in self._let_in)

    def _absent(self, keys: Iterable[AdapterKey]) -> dict[Hashable, AdapterKey]:
        """Those whose adapter is not in the pool. By content where that is known, so that two names are read once."""
        absent: dict[Hashable, AdapterKey] = {}
        for key in keys:
            identity = self._library.identity(_ref(key))
            if identity is None or self._cache.pages(identity) is None:
                absent.setdefault(identity or key, key)
        return absent

    def _start_reading(self, due: Mapping[Hashable, AdapterKey]) -> None:
        limit = max(self._max_pending, len(self._due))
        reading = self._absent(self._reading)
        for what, key in due.items():
            if len(self._reading) + len(self._images) >= limit:
                return
            # By key too: its content may have become known since `due` was made.
            if what not in self._images and what not in reading and key not in self._reading:
                self._reading[key] = self._readers.submit(self._read, key)

    def _forget_all_but_due(self) -> None:
        """Drop what nobody waits for, or only those whose turn comes later, and tables of evicted adapters."""
        self._images = {what: image for what, image in self._images.items() if what in self._due}
        for what, key in self._absent(self._reading).items():
            if what not in self._due and self._reading[key].cancel():
                del self._reading[key]
        for identity in [i for i in self.resident if self._cache.pages(i) is None]:
            del self.resident[identity]

    def _read(self, key: AdapterKey) -> AdapterImage:
        began = monotonic()
        adapter = self._library.load(_ref(key), checked=False)
        self._check_fits(adapter)
        image = self._pages.layout(adapter)  # which waits for the checks
        with self._lock:
            # The first one is all the experience there is.
            weight = LOAD_WEIGHT if self._read_s else 1.0
            self._read_s += weight * (monotonic() - began - self._read_s)
        return image


def _keys(request: Demand) -> Iterator[AdapterKey]:
    return (key for key, _ in request.adapters)


def _ref(key: AdapterKey) -> AdapterRef:
    """The scheduler hands back what the engine gave it."""
    assert isinstance(key, AdapterRef)
    return key
