"""Log-probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from manylora.server.messages import TokenLogprobs
from manylora.server.token_texts import TokenTexts

LEAST = -9999.0
"""Written for minus infinity, which JSON has no word for, as OpenAI does."""


class CompletionLogprobs(msgspec.Struct):
    """Lists with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The most likely tokens, and the sampled one."""
    text_offset: list[int]
    """Characters of the tokens before."""


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


def completion_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int = 0
) -> CompletionLogprobs | None:
    """Return None if no log-probabilities were asked for, or no token came.

    Args:
        offset: characters of the tokens before the first of these.
    """
    if not logprobs:
        return None
    tokens = [texts.text_of(token_id) for token_id in token_ids]
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    top = [
        {texts.text_of(token_id): _finite(value) for token_id, value in (*one.top, (sampled, one.sampled))}
        for sampled, one in zip(token_ids, logprobs, strict=True)
    ]
    return CompletionLogprobs(tokens, [_finite(one.sampled) for one in logprobs], top, offsets)


def chat_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> ChatLogprobs | None:
    """Return None if no log-probabilities were asked for, or no token came."""
    if not logprobs:
        return None

    def told(token_id: int, value: float) -> tuple[str, float, list[int]]:
        return texts.text_of(token_id), _finite(value), list(texts.bytes_of(token_id))

    return ChatLogprobs(
        [
            ChatLogprob(*told(sampled, one.sampled), [TopLogprob(*told(*each)) for each in one.top])
            for sampled, one in zip(token_ids, logprobs, strict=True)
        ]
    )


def _finite(value: float) -> float:
    return max(value, LEAST)
