"""POST /v1/completions: prompts in, text out."""

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
from manylora.server.logprobs import CompletionLogprobs, completion_logprobs
from manylora.server.messages import Chunk
from manylora.server.openapi import described
from manylora.server.protocol import CompletionBody
from manylora.server.service import Service
from manylora.server.token_texts import TokenTexts


class CompletionChoice(msgspec.Struct):
    index: int
    """Prompt by prompt, `n` for each."""
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    """stop or length; null as long as there is more."""


class Completion(msgspec.Struct):
    """The answer, and each event of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/v1/completions", **described(Completion, stream=True))
    async def create_completion(request: Request, body: Annotated[CompletionBody, Body()]) -> Response:
        """Continue each prompt with the mixture that the request names."""
        return await respond(
            service, request, body, lambda: _tokenized(service, body), "cmpl", CompletionFormat
        )

    return routes


async def _tokenized(service: Service, body: CompletionBody) -> Sequence[Sequence[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return await service.prompts.of_texts([prompt])
    if isinstance(prompt[0], str):
        return await service.prompts.of_texts(prompt)
    return [prompt] if isinstance(prompt[0], int) else prompt


class CompletionFormat:
    """Writes samples as OpenAI's text completions."""

    def __init__(
        self, answer_id: str, model: str, token_texts: TokenTexts, usage: UnsetType | None
    ) -> None:
        self._id, self._model, self._texts, self._usage = answer_id, model, token_texts, usage
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}  # sample -> characters of its tokens so far

    def event(self, sample: int, chunk: Chunk) -> bytes:
        offset = self._offsets.get(sample, 0)
        logprobs = completion_logprobs(self._texts, chunk.token_ids, chunk.logprobs, offset)
        if logprobs is not None:
            self._offsets[sample] = offset + sum(map(len, logprobs.tokens))
        return self._encode(
            [CompletionChoice(sample, chunk.text, logprobs, chunk.finish_reason)], self._usage
        )

    def usage_event(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def answer(self, samples: Sequence[Sample], usage: Usage) -> bytes:
        choices = [
            CompletionChoice(
                index,
                "".join(sample.text),
                completion_logprobs(self._texts, sample.token_ids, sample.logprobs),
                sample.finish_reason,
            )
            for index, sample in enumerate(samples)
        ]
        return self._encode(choices, usage)

    def _encode(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
        return msgspec.json.encode(Completion(self._id, self._created, self._model, choices, usage))
