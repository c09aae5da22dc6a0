"""API keys: whose request it is, and which adapters exist for it. Knows no HTTP.

A JSON or TOML file lists the keys, in plain or as the hex of their SHA-256:

    {"keys": [{"key": "sk-..", "tenant": "acme", "adapters": ["acme/*", "shared-*"]},
              {"sha256": "9f86d0..", "tenant": "ops", "adapters": ["*"], "admin": true}]}

and the environment variable MANYLORA_API_KEY holds one more, which may do everything. With neither, everybody may.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from manylora.errors import ConfigError

KEY_VARIABLE = "MANYLORA_API_KEY"
"""Environment variable of a key that sees every adapter and administers."""

_FIELDS = {"key": str, "sha256": str, "tenant": str, "adapters": list, "admin": bool}


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a key stands for."""

    name: str
    """Requests of one name share their prefixes and their turn in the queue."""

    adapters: tuple[str, ...] = ("*",)
    """Patterns of the adapters' names; `*` matches any characters, also `/`. What none matches does not exist here."""

    is_admin: bool = True
    """Whether it may load, unload and pin adapters and read the metrics."""

    def sees(self, adapter: str) -> bool:
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


EVERYBODY = Tenant(name="")
"""Whose requests those of a server without keys are."""


class Tenants:
    """All keys, as digests: nothing that is logged or dumped holds a key."""

    def __init__(self, keys: Sequence[tuple[bytes, Tenant]] = ()) -> None:
        """
        Args:
            keys: (SHA-256 of the key, whom it stands for); none: no key is asked for.
        """
        self._keys = tuple(keys)

    @classmethod
    def load(cls, file: Path | None, environment: Mapping[str, str] = os.environ) -> Tenants:
        """Read the keys of a file, if there is one, and of the environment.

        Raises:
            ConfigError: the file cannot be read, or an entry of it is not as above; names the entry, never its key.
        """
        keys = [] if file is None else _read(file)
        if environment.get(KEY_VARIABLE):
            keys.append((_digest(environment[KEY_VARIABLE]), Tenant("admin")))
        if len({digest for digest, _ in keys}) < len(keys):
            raise ConfigError(f"an API key stands twice in {file} and {KEY_VARIABLE}; each must stand once")
        return cls(keys)

    @property
    def are_asked_for(self) -> bool:
        return bool(self._keys)

    def of(self, key: str | None) -> Tenant | None:
        """Return whom a key stands for; None: nobody. The time does not tell how much of a key is right, or which."""
        if not self._keys:
            return EVERYBODY
        if not key:  # whose digest an entry may hold by mistake
            return None
        digest, found = _digest(key), None
        for known, tenant in self._keys:  # all of them, wherever the right one stands
            if hmac.compare_digest(digest, known):
                found = tenant
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path) -> list[tuple[bytes, Tenant]]:
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"API keys: {file} cannot be read: {error.strerror}") from None
    except ValueError:  # its message may quote a line, and so a key
        kind = "TOML" if file.suffix == ".toml" else "JSON"
        raise ConfigError(f"API keys: {file} is no valid {kind}") from None
    if not isinstance(values, dict) or set(values) != {"keys"} or not isinstance(values["keys"], list):
        raise ConfigError(f'API keys: {file} must hold one list, "keys"')
    if not values["keys"]:
        raise ConfigError(
            f"API keys: {file} holds none, so that nobody could ask anything; leave the file out"
        )
    return [
        _entry(entry, f"API keys: {file}, entry {number}") for number, entry in enumerate(values["keys"], 1)
    ]


def _entry(entry: Any, where: str) -> tuple[bytes, Tenant]:
    if not isinstance(entry, dict) or entry.keys() - _FIELDS:
        raise ConfigError(f"{where}: expected an object with {list(_FIELDS)}")
    for name, value in entry.items():
        if not isinstance(value, _FIELDS[name]):
            raise ConfigError(f"{where}: {name} must be of type {_FIELDS[name].__name__}")
    if ("key" in entry) == ("sha256" in entry) or not entry.get("tenant"):
        raise ConfigError(f'{where}: expected "tenant", and either "key" or "sha256"')
    patterns = entry.get("adapters", [])
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{where}: adapters must be patterns like 'acme/*'")
    tenant = Tenant(entry["tenant"], tuple(patterns), entry.get("admin", False))
    if tenant.is_admin and "*" not in patterns:  # what it loads, points and evicts is everybody's
        raise ConfigError(
            f'{where}: an administrator sees every adapter; give "adapters": ["*"], or no "admin"'
        )
    if "key" in entry:
        if not entry["key"]:
            raise ConfigError(f"{where}: the key is empty")
        return _digest(entry["key"]), tenant
    if not re.fullmatch(r"[0-9a-fA-F]{64}", entry["sha256"]):
        raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits")
    return bytes.fromhex(entry["sha256"]), tenant
