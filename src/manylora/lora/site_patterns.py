"""The regular expressions of one file: matched with sites as PEFT does it, within bounds. Knows no key of a config.

Whoever makes an adapter writes them, and there are short ones on which Python's `re` would try for years, holding the
interpreter lock. The regex package reads the same language and can be told when to end; what it cannot bound is the
memory of a pattern whose repeats lie in one another, so that is bounded here, by what `re` has parsed.
"""

from __future__ import annotations

import re
from re import _parser as parser  # type: ignore[attr-defined]  # the module itself gives no tree
from time import thread_time
from typing import Any

import regex

from manylora.errors import AdapterFormatError
from manylora.lora.names import quoted

MAX_PATTERN_LEN = 1 << 16
"""Characters of a pattern. An alternative for each site of a UNet takes about 50,000."""

MAX_SIZE = 400_000
"""Items of all patterns of a file, with what stands in a repeat counted as often as it must be there."""

MAX_MATCH_S = 5.0
"""Processor time for all that is matched of a file: a thousand sites with a thousand patterns take two seconds."""

LOCKED_S = 0.001
"""How long a match may hold the interpreter lock. Most take a microsecond, for which it is not worth letting go."""


class SitePatterns:
    """Patterns, each added before it is matched."""

    def __init__(self, source: str) -> None:
        """source: how messages call the file."""
        self._source = source
        self._compiled: dict[str, Any] = {}
        self._size = 0
        self._left_s = MAX_MATCH_S

    def add(self, pattern: str, key: str, text: str) -> None:
        """Take in a pattern, made of the text that the file holds under a key.

        Raises:
            AdapterFormatError: it is no regular expression, or too large a one.
        """
        if pattern in self._compiled:
            return
        if len(text) > MAX_PATTERN_LEN:
            raise AdapterFormatError(
                f"{self._source}: {key}: a regular expression may have {MAX_PATTERN_LEN:,} characters, "
                f"got {len(text):,}; give a list of names"
            )
        try:
            re.compile(pattern)
            self._size += _size(parser.parse(pattern))
            if self._size <= MAX_SIZE:
                self._compiled[pattern] = regex.compile(pattern, cache_pattern=False)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            message = f"{self._source}: {key}: {quoted(text)} is no regular expression: {error}"
            raise AdapterFormatError(message) from None
        if self._size > MAX_SIZE:
            raise AdapterFormatError(
                f"{self._source}: {key}: with {quoted(text)} the regular expressions of this file would have "
                f"{self._size:,} items, repeats written out, and at most {MAX_SIZE:,} are taken; give a list of names"
            )

    def match(self, pattern: str, site: str, *, whole: bool = False) -> Any:
        """Return the match at the beginning of a site, or with the whole of it; None if there is none.

        Raises:
            AdapterFormatError: the patterns of this file have taken their time.
        """
        compiled = self._compiled[pattern]
        match = compiled.fullmatch if whole else compiled.match
        began = thread_time()
        try:
            if self._left_s <= 0:
                raise TimeoutError
            try:
                return match(site, timeout=min(LOCKED_S, self._left_s))
            except TimeoutError:
                return match(site, timeout=self._left_s, concurrent=True)
        except TimeoutError:
            raise AdapterFormatError(
                f"{self._source}: matching its regular expressions takes longer than {MAX_MATCH_S:g} s, at last "
                f"{quoted(pattern)} with site {quoted(site)}; give a list of names"
            ) from None
        finally:
            self._left_s -= thread_time() - began


def _size(node: Any) -> int:
    """Items of a parsed pattern; of what is repeated, as many as compiling it may write out."""
    if isinstance(node, parser.SubPattern):
        return sum(_size(value) * _times(operator, value) for operator, value in node)
    if isinstance(node, (list, tuple)):
        return 1 + sum(map(_size, node))
    return 1


def _times(operator: Any, value: Any) -> int:
    """The least number of repeats are written out, and what may follow them once more."""
    return value[0] + 1 if str(operator).endswith("REPEAT") else 1
