"""Cuts a stream of text where a stop string comes. Knows text only, no tokens."""

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """Passes text on, except what may be the beginning of a stop string: that waits until it is decided.

    The text ends at the first character that completes a stop string; where it completes several, the longest
    counts. So the cut does not depend on the pieces in which the text comes, and no beginning of the string that
    ended it has been shown.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        """Begin a text.

        Args:
            include: leave the stop string at the text's end.
        """
        self._prefixes = [_GrowingPrefix(string) for string in strings]
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text. feed must not be called after that."""

    def feed(self, piece: str, *, may_stop: bool = True) -> str:
        """Take the next piece; return the text that can be shown.

        Args:
            may_stop: False passes over the stop strings that this piece completes.
        """
        assert self.matched is None, "the text has ended"
        if not self._prefixes:
            return piece
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            completed = [prefix.string for prefix in self._prefixes if prefix.grow(character)]
            if completed and may_stop:
                self.matched = max(completed, key=len)
                self._held = ""
                return text[: end if self._include else end - len(self.matched)]
        num_held = max(prefix.length for prefix in self._prefixes)
        shown, self._held = text[: len(text) - num_held], text[len(text) - num_held :]
        return shown

    def finish(self) -> str:
        """Return the text that was held back: no more comes, so it begins no stop string."""
        rest, self._held = self._held, ""
        return rest


class _GrowingPrefix:
    """How much of the beginning of a string the text ends with: the Knuth-Morris-Pratt automaton.

    A character costs constant time on average, however long the string and whatever the text.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        """The longest beginning of the string, not all of it, that the text ends with."""
        self._shorter = _borders(string)

    def grow(self, character: str) -> bool:
        """Take the text's next character; return whether it completes the string."""
        self.length = self._extended(self.length, character)
        is_complete = self.length == len(self.string)
        if is_complete:
            self.length = self._shorter[self.length]
        return is_complete

    def _extended(self, length: int, character: str) -> int:
        return _extended(self.string, self._shorter, length, character)


@lru_cache(maxsize=1024)  # the samples of a request share it
def _borders(string: str) -> Sequence[int]:
    """[n]: the longest beginning of the string that its first n characters end with, besides themselves."""
    shorter = [0, 0]
    for character in string[1:]:
        shorter.append(_extended(string, shorter, shorter[-1], character))
    return shorter


def _extended(string: str, shorter: Sequence[int], length: int, character: str) -> int:
    while length and string[length] != character:
        length = shorter[length]
    return length + (string[length] == character)
