"""Adapter names: what may be one, and which are near a wrong one. Knows no file and no root."""

from __future__ import annotations

import difflib
import heapq
import re
from collections.abc import Iterable
from itertools import pairwise

from manylora.errors import AdapterNotFoundError

MAX_NAME_LEN = 512

UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\+:]")
"""Control characters, bytes that are not UTF-8, a separator of paths elsewhere, and the separators of a mixture."""


def check_name(name: str) -> None:
    """Refuse what cannot be a name: a name is a path below a root, so it must not lead out of it.

    Raises:
        AdapterNotFoundError: with the reason. Whoever asks for such a name asks for nothing that exists.
    """
    if problem := name_problem(name):
        raise AdapterNotFoundError(f"{quoted(name)} cannot be the name of an adapter: {problem}")


def name_problem(name: object) -> str | None:
    """Return why `name` cannot be the name of an adapter, or None."""
    if not isinstance(name, str):
        return f"expected a string, got {type(name).__name__}"
    if not 0 < len(name) <= MAX_NAME_LEN:
        return f"expected 1 to {MAX_NAME_LEN} characters, got {len(name)}"
    if unfit := UNFIT.search(name):
        return f"it holds {unfit[0]!r}, which no name may"
    # Covers "..", an absolute path, and hidden folders, where half-written copies lie.
    if not all(part and not part.startswith(".") for part in name.split("/")):
        return "expected parts joined by single '/', none of them empty or beginning with '.'"
    return None


def near_matches(name: str, names: Iterable[str], num_matches: int = 3) -> list[str]:
    """Return the names most like `name`, best first.

    difflib is too slow for thousands of names. So they are first ranked by the letter pairs that they share
    with `name`, and difflib compares the best 50.
    """
    wanted = _letter_pairs(name)

    def num_shared(other: str) -> tuple[int, int]:
        return len(wanted & _letter_pairs(other)), -abs(len(other) - len(name))

    return difflib.get_close_matches(name, heapq.nlargest(50, names, key=num_shared), n=num_matches)


def quoted(name: object) -> str:
    """`name` for a message: escapes shown, and no longer than a line."""
    text = repr(name)
    return text if len(text) <= 100 else f"{text[:90]}...'"


def _letter_pairs(name: str) -> set[str]:
    return set(map("".join, pairwise(name)))
