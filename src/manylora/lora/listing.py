"""The names of one root, read when first wanted. A hint: what is there is for the root to say."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from manylora.lora.aside import aside
from manylora.lora.sources import Source


class Listing:
    def __init__(self, source: Source) -> None:
        self.source = source
        self._names: set[str] | None = None
        self._anew: Future[None] | None = None
        self._lock = threading.Lock()
        self._reading = (
            threading.Lock()
        )  # apart, so that nobody who only notes a name waits for a slow root

    @property
    def is_known(self) -> bool:
        """Whether `known_names` tells all: a local folder is quickly read, a remote root only on demand."""
        return self.source.kind == "folder" or self._names is not None

    def names(self) -> set[str]:
        """Return the names, reading the root if that was not done since `forget`."""
        with self._reading:
            with self._lock:
                names = self._names
            if names is None:
                names = set(self.source.names())
                with self._lock:
                    self._names = names
        with self._lock:  # `note` may be adding to it
            return set(names)

    def known_names(self) -> set[str]:
        """Return the names as far as they can be had without asking a remote root."""
        return self.names() if self.is_known else set()

    def read_anew(self) -> Future[None]:
        """Begin to read the names anew, unless that is under way. Until then, or if it fails, the old ones count."""
        with self._lock:
            if self._anew is None or self._anew.done():
                self._anew = aside(self._read)
            return self._anew

    def note(self, name: str, exists: bool) -> None:
        """Take in what was just seen of one name."""
        with self._lock:
            if self._names is not None:
                (self._names.add if exists else self._names.discard)(name)

    def forget(self) -> None:
        with self._lock:
            self._names = None

    def _read(self) -> None:
        names = set(self.source.names())
        with self._lock:
            self._names = names
