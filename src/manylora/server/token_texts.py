"""Single tokens as bytes and text, for log-probabilities. A token may be a part of a character."""

from __future__ import annotations

import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """The vocabulary of one tokenizer of the tokenizers library: byte-level, or of SentencePiece."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._is_byte_level = "ByteLevel" in repr(self._backend.decoder)
        self._added = {
            token_id: token.content for token_id, token in self._backend.get_added_tokens_decoder().items()
        }
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; none for an id that names no token."""
        if token_id not in self._known:
            self._known[token_id] = self._find(token_id)
        return self._known[token_id]

    def text_of(self, token_id: int) -> str:
        r"""The token's text; "bytes:\xe2\x80", as OpenAI has it, where its bytes are no text by themselves."""
        value = self.bytes_of(token_id)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def _find(self, token_id: int) -> bytes:
        if token_id in self._added:
            content: str = self._added[token_id]
            return content.encode()
        token: str = self._backend.id_to_token(token_id) or ""
        if self._is_byte_level:
            return bytes(_BYTE_OF[character] for character in token if character in _BYTE_OF)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()


def _byte_characters() -> dict[str, int]:
    """How byte-level tokenizers write each byte: as itself where Latin-1 can print it, else from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
