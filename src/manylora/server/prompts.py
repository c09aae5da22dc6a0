"""Prompts as tokens, and tokens as text. On a thread of its own, so that a long prompt holds up no other's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from jinja2 import TemplateError

from manylora.server.api_errors import ApiError
from manylora.server.protocol import Rendering

T = TypeVar("T")


class Prompts:
    """One tokenizer. One thread: the tokenizers of transformers are not made for several at a time."""

    def __init__(self, tokenizer: Any, max_position: int) -> None:
        """max_position: tokens of the model's context."""
        self._tokenizer = tokenizer
        self._max_position = max_position
        # Vocabularies write a token with a character for each of its bytes or characters, or with more.
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def of_texts(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Return the tokens of texts.

        Raises:
            ApiError: 400; one is so long that it cannot fit into the context. Then none is tokenized.
        """
        for text in texts:
            self._check_length(len(text), "prompt")
        encode = partial(self._tokenizer.encode, add_special_tokens=add_special_tokens)
        encoded: list[list[int]] = await asyncio.gather(
            *(self._run(partial(encode, text)) for text in texts)
        )
        return encoded

    async def of_chat(self, rendering: Rendering) -> list[int]:
        """Return the tokens of messages as the model's chat template writes them.

        Raises:
            ApiError: 400; the model has no template, or it refuses these messages; or they cannot fit into the context.
        """
        messages = [message.rendered() for message in rendering.messages]
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        render = partial(
            self._tokenizer.apply_chat_template,
            messages,
            add_generation_prompt=rendering.add_generation_prompt,
            continue_final_message=rendering.continue_final_message,
            tokenize=True,
            return_dict=False,
        )
        try:
            return await self._run(render)
        except (TemplateError, ValueError) as error:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None

    async def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included.

        Raises:
            ApiError: 400; an id that is none of the vocabulary.
        """
        size = len(self._tokenizer)
        for token_id in token_ids:
            if token_id >= size:
                raise ApiError(
                    400, f"token {token_id} is no id of the vocabulary, 0 to {size - 1}", param="tokens"
                )
        return await self._run(partial(self._tokenizer.decode, list(token_ids), skip_special_tokens=False))

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary writes them."""
        return await self._run(partial(self._tokenizer.convert_ids_to_tokens, list(token_ids)))

    def _check_length(self, num_chars: int, param: str) -> None:
        """Refuse what needs no tokenizing to be known as too long: that takes seconds, in which no one else is served.

        It takes texts that turn out too long later: nearly every token is shorter than the longest one.
        """
        max_chars = self._max_position * self._longest_token
        if num_chars > max_chars:
            raise ApiError(
                400,
                f"`{param}` has {num_chars:,} characters; the {self._max_position:,} tokens of the model's context are "
                f"{max_chars:,} characters at most, for no token has more than {self._longest_token}",
                param=param,
            )

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
