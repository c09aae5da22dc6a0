"""Brings adapters from the library to the pool, beside compute.

    demanded -> reading (threads) -> image in host memory -> copying (thread) -> ready

Requests demand what they name when they come, from any thread, and the demand ends with them. Everything but the
reading and copying itself happens inside `poll`, `lookup` and `place`, on the engine's thread.
"""

from collections import Counter
from collections.abc import Callable, Container
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import RLock
from typing import Any

from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.library import Library
from manylora.lora.reader import AdapterRef
from manylora.memory.adapter_cache import AdapterCache
from manylora.memory.pages import PageId
from manylora.models.adapter_pages import AdapterImage, AdapterPages, ResidentAdapter
from manylora.text.sequence import AdapterKey


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
            max_pending: most adapters being read or read and waiting for pages.
        """
        self.resident: dict[AdapterId, ResidentAdapter] = {}
        self._library = library
        self._pages = pages
        self._cache = cache
        self._check_fits = check_fits
        self._max_pending = max_pending
        # Guards what `demand` touches, which any thread may call.
        self._lock = RLock()
        self._demand: Counter[AdapterKey] = Counter()
        self._reading: dict[AdapterKey, Future[AdapterImage]] = {}
        self._images: dict[AdapterId, AdapterImage] = {}
        self._copying: dict[AdapterId, Future[ResidentAdapter]] = {}
        self._readers = ThreadPoolExecutor(num_threads, "adapter-reader")
        # Apart from the readers: a copy into the pool takes milliseconds and must not wait for a slow disk.
        self._copier = ThreadPoolExecutor(1, "adapter-copier")

    def demand(self, ref: AdapterRef) -> None:
        """A request wants this adapter. Reading begins now unless enough are on their way."""
        with self._lock:
            self._demand[ref] += 1
            self._start_reading()

    def release_demand(self, ref: AdapterRef) -> None:
        with self._lock:
            self._demand[ref] -= 1
            if self._demand[ref] == 0:
                del self._demand[ref]

    def poll(self) -> dict[AdapterKey, Exception]:
        """Take in what has been read and copied, begin what is due; return what could not be read, with the reason."""
        with self._lock:
            failures = self._take_images()
            for identity in [identity for identity, copy in self._copying.items() if copy.done()]:
                self.resident[identity] = self._copying.pop(identity).result()
                self._cache.mark_ready(identity)
            self._forget_unwanted()
            self._start_reading(failures)
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
            error = future.exception()
            if error is not None:
                assert isinstance(error, Exception)
                failures[key] = error
            elif self._cache.pages(future.result().identity) is None:
                # Else another name of the same content was quicker.
                self._images[future.result().identity] = future.result()
        return failures

    def _start_reading(self, failures: Container[AdapterKey] = ()) -> None:
        for key in self._demand:  # in the order in which they were first demanded
            if len(self._reading) + len(self._images) >= self._max_pending:
                return
            if key not in failures and key not in self._reading and self.lookup(key) is None:
                self._reading[key] = self._readers.submit(self._read, key)

    def _read(self, key: AdapterKey) -> AdapterImage:
        adapter = self._library.load(_ref(key))
        self._check_fits(adapter)
        return self._pages.layout(adapter)

    def _forget_unwanted(self) -> None:
        """Drop images that nobody waits for any more, and tables of adapters that have been evicted."""
        wanted = {self._library.identity(_ref(key)) for key in self._demand}
        self._images = {i: image for i, image in self._images.items() if i in wanted}
        for identity in [i for i in self.resident if self._cache.pages(i) is None]:
            del self.resident[identity]


def _ref(key: AdapterKey) -> AdapterRef:
    """The scheduler hands back what the engine gave it."""
    assert isinstance(key, AdapterRef)
    return key
