"""POST /v1/chat/completions: messages in, the assistant's next one out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
from fastapi import APIRouter, Body, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from manylora.server.answers import respond
from manylora.server.generation import Sample, Usage
from manylora.server.http_body import BodyRoute
from manylora.server.logprobs import ChatLogprobs, chat_logprobs
from manylora.server.messages import Chunk
from manylora.server.openapi import described
from manylora.server.protocol import ChatBody
from manylora.server.service import Service
from manylora.server.token_texts import TokenTexts


class ChatMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    """stop or length."""


class ChatCompletion(msgspec.Struct):
    """The answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"


class ChatDelta(msgspec.Struct, omit_defaults=True):
    content: str | UnsetType = UNSET
    role: str | UnsetType = UNSET
    """With a sample's first event."""


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(msgspec.Struct):
    """One event of a stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/v1/chat/completions", **described(ChatCompletion, stream=True))
    async def create_chat_completion(request: Request, body: Annotated[ChatBody, Body()]) -> Response:
        """Answer a chat with the mixture that the request names."""

        async def tokenized() -> Sequence[Sequence[int]]:
            return [await service.prompts.of_chat(body)]

        return await respond(service, request, body, tokenized, "chatcmpl", ChatFormat)

    return routes


class ChatFormat:
    """Writes samples as OpenAI's chat completions."""

    def __init__(
        self, answer_id: str, model: str, token_texts: TokenTexts, usage: UnsetType | None
    ) -> None:
        self._id, self._model, self._texts, self._usage = answer_id, model, token_texts, usage
        self._created = int(time.time())
        self._begun: set[int] = set()

    def event(self, sample: int, chunk: Chunk) -> bytes:
        role: str | UnsetType = UNSET if sample in self._begun else "assistant"
        self._begun.add(sample)
        logprobs = chat_logprobs(self._texts, chunk.token_ids, chunk.logprobs)
        choice = ChatChunkChoice(sample, ChatDelta(chunk.text, role), logprobs, chunk.finish_reason)
        return self._encode([choice], self._usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def answer(self, samples: Sequence[Sample], usage: Usage) -> bytes:
        choices = [
            ChatChoice(
                index,
                ChatMessage("".join(sample.text)),
                chat_logprobs(self._texts, sample.token_ids, sample.logprobs),
                sample.finish_reason,
            )
            for index, sample in enumerate(samples)
        ]
        return msgspec.json.encode(ChatCompletion(self._id, self._created, self._model, choices, usage))

    def _encode(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> bytes:
        return msgspec.json.encode(ChatChunk(self._id, self._created, self._model, choices, usage))
