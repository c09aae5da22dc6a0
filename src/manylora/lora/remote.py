"""The root that is a URL: S3, HTTP, the Hugging Face Hub, whatever fsspec speaks. Reads no weights."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from manylora.errors import AdapterFormatError, AdapterNotFoundError, AdapterUnavailableError, ConfigError
from manylora.lora.downloads import DownloadCache
from manylora.lora.formats import CONFIG_FILE, TENSOR_FILE
from manylora.lora.names import name_problem, quoted
from manylora.lora.patience import Patience
from manylora.lora.sources import Found, missing_file, replaced_since

VALIDATORS = (
    "ETag",
    "etag",
    "Content-MD5",
    "content_md5",
    "Digest",
    "md5Hash",
    "crc32c",
    "generation",
    "VersionId",
    "blob_id",
    "xet_hash",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "modified",
    "created",
)
"""What file systems report that changes with a file's content. Other fields, such as the result of a scan,
may change while the content does not."""

_NO_LISTING = {401, 403, 405}
"""Statuses of a web server that answers, but shows no list of a folder."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RemoteSource:
    """A URL. A name below it is an adapter if `URL/name/adapter_config.json` exists.

    To locate an adapter takes two requests; to open it four more, unless that version is in the cache.
    Each file system retries and times out by rules of its own, which `options` can set.
    """

    kind: Literal["remote"] = "remote"

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        cache: DownloadCache,
        resolve_timeout_s: float | None = None,
        fetch_timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            resolve_timeout_s: longest that `find` waits. None: as long as the file system does.
            fetch_timeout_s: longest that `open` waits for an adapter that is not in the cache. None: likewise.
        """
        parts = urlsplit(url)
        credentials, at, host = parts.netloc.rpartition("@")
        self._credentials = credentials + at
        self.label = f"{parts.scheme}://{host}{parts.path}".rstrip("/") if host else url
        self._is_http = parts.scheme in ("http", "https")
        if self._is_http and (not host or parts.query or parts.fragment):
            raise ConfigError(
                f"adapter root '{self.label}': expected http(s)://host/path, with no '?' and no '#'"
            )
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(
                f"adapter root '{self.label}' cannot be used: {self._reason(error)}"
            ) from error
        if isinstance(self._fs, LocalFileSystem):
            raise ConfigError(f"adapter root '{self.label}' is a local folder; give its path, not a URL")
        self._cache = cache
        self._patience = None if resolve_timeout_s is None else Patience(resolve_timeout_s)
        self._fetch_patience = None if fetch_timeout_s is None else Patience(fetch_timeout_s)
        # What a name is put behind: for the file system, and in a URL. A root may be bare, as hf:// is.
        self._prefix = f"{root.rstrip('/')}/" if root.strip("/") else ""
        self.url_prefix = f"{self.label.rstrip('/')}/" if host else self.label

    @property
    def folder(self) -> str:
        return os.path.abspath(self._cache.folder)

    def names(self) -> list[str]:
        """List the adapters below the root. A root that cannot be listed, such as hf://org, shows none."""
        # Object stores list all keys below a prefix, a thousand at a time. A web server is asked folder by
        # folder, and links on its pages may lead round and round.
        depth = {"maxdepth": 3} if self._is_http else {}
        try:
            self._fs.invalidate_cache(self._prefix)
            # find() takes a root that it cannot reach for an empty one; ls() says so.
            self._fs.ls(self._prefix, detail=False)
            paths = self._fs.find(self._prefix, **depth)
        except (NotImplementedError, ValueError, FileNotFoundError):
            return []
        except Exception as error:
            if self._is_http and getattr(error, "status", None) in _NO_LISTING:
                return []
            raise self._unreachable("list its names", error) from error
        below = (path.removeprefix(self._prefix).lstrip("/") for path in paths)
        names = (path.removesuffix("/" + CONFIG_FILE) for path in below if path.endswith("/" + CONFIG_FILE))
        return [name for name in (map(unquote, names) if self._is_http else names) if not _problem(name)]

    def find(self, name: str) -> Found | None:
        if problem := _problem(name):
            raise AdapterNotFoundError(f"{quoted(name)} cannot be the name of a remote adapter: {problem}")
        # Quoted, because "#" and "%2e%2e" mean something to a web server. Others take keys as they are.
        path = quote(name) if self._is_http else name
        if (files := self._ask_in_time(name, path)) is None:
            return None
        num_bytes = files[TENSOR_FILE].num_bytes
        return Found(location=self.url_prefix + path, version=_version(files), num_bytes=num_bytes)

    def name_of(self, location: str) -> str | None:
        if self._credentials:
            location = location.replace(self._credentials, "", 1)
        if not location.startswith(self.url_prefix):
            return None
        path = location.removeprefix(self.url_prefix)
        return unquote(path) if self._is_http else path

    @contextmanager
    def open(self, name: str, found: Found) -> Iterator[Path]:
        key = blake2b(f"{found.location}\0{found.version}".encode(), digest_size=20).hexdigest()
        try:
            folder = self._cache.get(
                key,
                lambda partial: self._download_in_time(name, found, partial),
                files=(CONFIG_FILE, TENSOR_FILE),
            )
        except OSError as error:
            raise AdapterUnavailableError(
                f"adapter {quoted(name)} cannot be stored in cache_dir: {error.strerror}"
            ) from error
        yield folder

    def _download_in_time(self, name: str, found: Found, folder: Path) -> None:
        """What hangs goes on by itself, ends after the file that it is at, and leaves nothing; nobody waits for it."""
        if self._fetch_patience is None:
            return self._download(name, found, folder)
        is_late = threading.Event()

        def download() -> None:
            try:
                self._download(name, found, folder, is_late)
            finally:
                if is_late.is_set():  # the file system made the folder again for what came
                    shutil.rmtree(folder, ignore_errors=True)

        try:
            return self._fetch_patience.ask(download)
        except TimeoutError:
            is_late.set()
            raise AdapterUnavailableError(
                f"adapter root '{self.label}' could not send {quoted(name)} within "
                f"{self._fetch_patience.timeout_s:g} s (fetch_timeout_s)"
            ) from None

    def _download(
        self, name: str, found: Found, folder: Path, is_late: threading.Event | None = None
    ) -> None:
        path = found.location.removeprefix(self.url_prefix)
        for file in (CONFIG_FILE, TENSOR_FILE):
            if is_late is not None and is_late.is_set():
                return
            self._get_file(name, f"{self._prefix}{path}/{file}", folder / file)
        # Asked after the download: if the version located is still there, it is what came.
        files = self._ask(name, path)
        if files is None or _version(files) != found.version:
            raise AdapterNotFoundError(replaced_since(name))
        for file, remote in files.items():
            if (num_bytes := (folder / file).stat().st_size) != remote.num_bytes:
                raise AdapterUnavailableError(
                    f"adapter {quoted(name)} cannot be fetched from '{self.label}': {file} came with "
                    f"{num_bytes:,} bytes, expected {remote.num_bytes:,}; load it again"
                )

    def _get_file(self, name: str, remote: str, local: Path) -> None:
        try:
            self._fs.get_file(remote, str(local))
        except FileNotFoundError:
            raise AdapterNotFoundError(replaced_since(name)) from None
        # Each file system lets errors of its own client through: aiohttp's, botocore's, httpx's.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                raise
            raise self._unreachable(f"send adapter {quoted(name)}", error) from error

    def _ask_in_time(self, name: str, path: str) -> dict[str, _RemoteFile] | None:
        if self._patience is None:
            return self._ask(name, path)
        try:
            return self._patience.ask(lambda: self._ask(name, path))
        except TimeoutError:
            raise AdapterUnavailableError(
                f"adapter root '{self.label}' could not say whether it holds {quoted(name)} within "
                f"{self._patience.timeout_s:g} s (resolve_timeout_s)"
            ) from None

    def _ask(self, name: str, path: str) -> dict[str, _RemoteFile] | None:
        """Return what the root says about both files now, None if there is no adapter_config.json."""
        files = {}
        for file in (CONFIG_FILE, TENSOR_FILE):
            try:
                if (
                    file == CONFIG_FILE
                ):  # else s3fs and the Hub's file system may tell what was there before
                    self._fs.invalidate_cache(f"{self._prefix}{path}")
                info = self._fs.info(f"{self._prefix}{path}/{file}")
            except FileNotFoundError as error:
                # HTTPFileSystem says this whatever went wrong; the cause tells.
                if self._is_http and getattr(error.__cause__, "status", None) not in (404, 410):
                    raise self._unreachable(f"say whether it holds {quoted(name)}", error) from error
                info = {}
            except Exception as error:
                raise self._unreachable(f"say whether it holds {quoted(name)}", error) from error
            if info.get("type") == "file":
                files[file] = _remote_file(f"{self.url_prefix}{path}/{file}", info)
            elif file == CONFIG_FILE:
                return None
            else:
                raise AdapterFormatError(missing_file(name, file))
        return files

    def _unreachable(self, what: str, error: Exception) -> AdapterUnavailableError:
        return AdapterUnavailableError(
            f"adapter root '{self.label}' could not {what}: {self._reason(error)}"
        )

    def _reason(self, error: BaseException) -> str:
        error = error.__cause__ or error
        text = (str(error).splitlines() or [""])[0][:200]
        return (
            f"{type(error).__name__}: {text.replace(self._credentials, '') if self._credentials else text}"
        )


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    num_bytes: int
    validators: tuple[tuple[str, str], ...]


def _remote_file(url: str, info: Mapping[str, Any]) -> _RemoteFile:
    validators = tuple((key, str(info[key])) for key in VALIDATORS if info.get(key))
    if info.get("size") is None or not validators:
        raise AdapterFormatError(
            f"{url}: the server tells no size, or neither ETag nor Last-Modified, so it would not be seen "
            "when the file is cut short or changes; have it send them, or copy the adapter to a local root"
        )
    return _RemoteFile(num_bytes=int(info["size"]), validators=validators)


def _version(files: Mapping[str, _RemoteFile]) -> str:
    return blake2b(repr(sorted(files.items())).encode(), digest_size=16).hexdigest()


def _problem(name: str) -> str | None:
    # s3fs reads a version after "?"; the Hub's file system a revision after "@", be it anybody's proposal.
    reserved = [character for character in "?@" if character in name]
    return name_problem(name) or (f"it holds {reserved[0]!r}" if reserved else None)
