"""Text from tokens, as they come. Never gives half a character, never takes a piece of text back.

The pieces of a sequence join to the text of its tokens all at once: the tokenizer's decode, without its clean-up of
spaces (which changes text already given). A character here is a code point: a combining mark, or the next part of
an emoji of several, may come in a later piece.
"""

from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from manylora.errors import ConfigError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What bytes that do not (yet) make a character are shown as."""


class FastTokenizer(Protocol):
    """A transformers tokenizer that is backed by the tokenizers library."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...


class Detokenizer:
    """What the sequences of one tokenizer share.

    Raises:
        ConfigError: the tokenizer is not backed by the tokenizers library.
    """

    def __init__(self, tokenizer: FastTokenizer | Tokenizer) -> None:
        backend = (
            tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        )
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"tokenizer {type(tokenizer).__name__} is not backed by the tokenizers library; "
                "load it with transformers.AutoTokenizer, or convert it to a tokenizer.json"
            )
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_ids = frozenset(filter(self._stands_for_a_byte, map(backend.token_to_id, _BYTE_TOKENS)))

    def start(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> "IncrementalDetokenizer":
        """Begin a sequence.

        Args:
            context: tokens before the first, whose text is not given again. With the prompt as context, the first
                word keeps the space in front of it, which tokenizers after SentencePiece drop at a text's start.
        """
        return IncrementalDetokenizer(self, skip_special_tokens, context)

    def text(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def is_visible(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether the token takes part in the text. A vocabulary padded for speed has ids that name no token."""
        if skip_special_tokens and token_id in self._special_ids:
            return False
        return self._backend.id_to_token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a run: "<0xE2>" of a tokenizer with byte fallback."""
        return token_id in self._byte_ids

    def _stands_for_a_byte(self, token_id: int | None) -> bool:
        return token_id is not None and self._backend.decode([token_id]) != self._backend.id_to_token(
            token_id
        )


_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

# The window's length at which it is cut to its last tokens. A character has at most 4 bytes and a token at least 1.
_LONGEST_WINDOW = 16
_KEPT_WINDOW = 4


class IncrementalDetokenizer:
    """The text of one sequence. Made by Detokenizer.start.

    Tokens are detokenized in a window: the last token whose text is complete, and what came after. The first gives
    the others the left neighbour that some tokenizers need for their spaces, so the window's text, less the part
    already given, is the new text. The work per token does not grow with the sequence.
    """

    def __init__(self, shared: Detokenizer, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._shared = shared
        self._skip_special_tokens = skip_special_tokens
        self._window = self._last_tokens(context)
        self._num_given = len(self._text().removesuffix(UNFINISHED))

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now and was not given before."""
        if not self._shared.is_visible(token_id, self._skip_special_tokens):
            return ""
        self._window.append(token_id)
        if self._shared.is_byte(token_id):
            # A run of byte tokens is text if all of it is UTF-8, else as many UNFINISHED as bytes: its first
            # characters are certain only when the run has ended.
            return ""
        text = self._text()
        # Bytes that the next token may complete show as one UNFINISHED, at the end.
        certain = text.removesuffix(UNFINISHED)
        piece = certain[self._num_given :]
        self._num_given = len(certain)
        if certain == text:
            self._restart_window([token_id], num_held=0)
        elif len(self._window) >= _LONGEST_WINDOW:
            self._restart_window(self._window[-_KEPT_WINDOW:], num_held=len(text) - self._num_given)
        return piece

    def finish(self) -> str:
        """Return what was held back, as it stands. The sequence ends here."""
        rest = self._text()[self._num_given :]
        self._num_given += len(rest)
        return rest

    def _text(self) -> str:
        return self._shared.text(self._window, self._skip_special_tokens)

    def _restart_window(self, window: list[int], num_held: int) -> None:
        self._window = window
        self._num_given = len(self._text()) - num_held

    def _last_tokens(self, context: Sequence[int]) -> list[int]:
        """Return the end of the context from which the window can start: not within a run of bytes."""
        window: list[int] = []
        for token_id in reversed(context):
            if self._shared.is_visible(token_id, self._skip_special_tokens):
                window.append(token_id)
                if len(window) >= _KEPT_WINDOW and not self._shared.is_byte(token_id):
                    break
        return window[::-1]
