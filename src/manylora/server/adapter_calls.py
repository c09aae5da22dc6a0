"""What the API process may ask about adapters. Runs in the engine process, on threads that may wait for disks."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from manylora.errors import AdapterNotFoundError, RequestError
from manylora.lora.fit import check_fits
from manylora.lora.library import Library
from manylora.lora.reader import AdapterRef
from manylora.models.sites import base_sites
from manylora.text.engine import Engine

LISTING_AGE_S = 5.0
"""How old a listing of the roots may be. What a request names is looked up when it comes, whatever the listing says."""

LISTING_WAIT_S = 10.0
"""How long a root may take to list its names before they are told as they were."""

log = logging.getLogger("manylora.engine")


class AdapterCalls:
    """Each public method is one call of `messages.Call`, with its arguments by name.

    A method that returns a future is answered when that is done: whoever waits for an adapter holds up no thread.
    """

    def __init__(self, engine: Engine, library: Library, roots: Sequence[str], max_loaded: int) -> None:
        """
        Args:
            roots: those of the library; paths of clients are taken below them.
            max_loaded: most names that `load_adapter` may have given and `unload_adapter` not have taken away.
        """
        self._engine = engine
        self._library = library
        self._roots = roots
        self._config = engine.model.config
        self._max_loaded = max_loaded
        self._loaded: set[str] = set()
        self._loading = threading.Lock()
        self._listed_at = -LISTING_AGE_S
        self._listing = threading.Lock()

    def names(self) -> list[str]:
        """All names, as the roots held them a few seconds ago at most: whoever asks often shall not make them list.

        Those of a root that does not answer are as it held them when it last did. Only one caller waits for that, since
        the threads of these calls are few; who asks meanwhile gets the names as they were last known.
        """
        if self._listing.acquire(blocking=False):
            try:
                if time.monotonic() - self._listed_at > LISTING_AGE_S:
                    for error in self._library.list_anew(LISTING_WAIT_S):
                        log.warning("the list of adapters is not up to date: %s", error)
                    self._listed_at = time.monotonic()
            finally:
                self._listing.release()
        return self._library.known_names()

    def adapter_info(self, name: str) -> dict[str, Any]:
        """What is known of an adapter without reading its weights."""
        ref = self._library.locate(name)
        identity = self._library.identity(ref)
        resident = next((one for one in self._engine.residency() if one.identity == identity), None)
        return {
            "name": name,
            "kind": ref.kind,
            "root": ref.location,
            "num_bytes": ref.num_bytes,
            "identity": identity,
            "resident": resident is not None,
            "pinned": resident is not None and resident.is_pinned,
        }

    def load_adapter(self, name: str, path: str | None = None) -> dict[str, Any]:
        """Read and check what lies at a path below a root, then point the name at it: a bad file changes nothing."""
        is_new = self._count(name)
        try:
            location, ref = self._locate(name if path is None else path)
            check_fits(self._library.load(ref), base_sites(self._config), self._config.name)
            self._library.add(name, location)
        except BaseException:
            if is_new:
                self._loaded.discard(name)
            raise
        return self.adapter_info(name)

    def unload_adapter(self, name: str) -> Future[int]:
        """Take the name away; the bytes given back, once the requests under way have ended."""
        done = self._engine.unload(name)
        self._loaded.discard(name)
        return done

    def pin(self, name: str) -> Future[None]:
        """Keep what the name points at in the pool; done when it is there."""
        return self._engine.pin(name)

    def unpin(self, name: str) -> None:
        """Take a pin back."""
        self._engine.unpin(name)

    def residency(self) -> list[dict[str, Any]]:
        """The adapters that have pages."""
        return [asdict(one) for one in self._engine.residency()]

    def _count(self, name: str) -> bool:
        """Count a name as loaded before anything is read for it; whether it was not counted yet.

        Raises:
            RequestError: as many are loaded as may be.
        """
        with self._loading:
            if name in self._loaded:
                return False
            if len(self._loaded) >= self._max_loaded:
                raise RequestError(
                    f"{self._max_loaded:,} adapters are loaded, and no more may be (max_loaded_adapters); unload one "
                    "first, or let requests name it by its path below a root, which needs no loading"
                )
            self._loaded.add(name)
            return True

    def _locate(self, path: str) -> tuple[str, AdapterRef]:
        """Where the first root that holds it has a path, and what lies there."""
        if os.path.isabs(path) or "://" in path:
            raise RequestError(
                f"expected the path of an adapter below one of the server's roots, got {path!r}"
            )
        for root in self._roots:
            location = os.path.abspath(root) if "://" not in root else root.rstrip("/")
            try:
                return f"{location}/{path}", self._library.locate_at(f"{location}/{path}")
            except AdapterNotFoundError:
                continue
        raise AdapterNotFoundError(f"no root of this server holds an adapter at {path!r}")


CALLS = frozenset(name for name in vars(AdapterCalls) if not name.startswith("_"))
"""The methods that may be called."""
