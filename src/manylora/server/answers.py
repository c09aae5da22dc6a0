"""From the samples of a request to its answer: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

import msgspec
from fastapi import Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from manylora.server.api_errors import ApiError
from manylora.server.generation import Generation, Sample, Usage
from manylora.server.messages import Chunk
from manylora.server.protocol import Sampling
from manylora.server.service import Service, context_of
from manylora.server.token_texts import TokenTexts


class Format(Protocol):
    """How one endpoint writes samples as JSON."""

    def event(self, sample: int, chunk: Chunk) -> bytes:
        """What one step brought to one sample."""

    def usage_event(self, usage: Usage) -> bytes:
        """The last event, if the client asked for one."""

    def answer(self, samples: Sequence[Sample], usage: Usage) -> bytes:
        """All at once."""


FormatOf = Callable[[str, str, TokenTexts, UnsetType | None], Format]
"""From an answer's id, its model, the texts of tokens, and what an event that is not the last says as `usage`."""


async def respond(
    service: Service,
    request: Request,
    body: Sampling,
    tokenize: Callable[[], Awaitable[Sequence[Sequence[int]]]],
    id_prefix: str,
    format_of: FormatOf,
) -> Response:
    """Run a request; returns the answer, or a stream of events.

    A stream begins with its first token, so that whatever goes wrong before is an answer with a status of its own.

    Args:
        tokenize: gives the prompts; asked when it is known that there is something to run them with.
    """
    context = context_of(request)
    context.fields |= {"model": body.model, "user": body.user}
    mixture = service.mixture(context.tenant, body.model, body.lora_terms)
    prompts = await tokenize()
    # An event has "usage": null where the last one has the counts.
    usage = None if body.include_usage else UNSET
    answer = format_of(f"{id_prefix}-{context.request_id}", body.model, service.token_texts, usage)
    async with AsyncExitStack() as stack:
        generation = await stack.enter_async_context(Generation(service, request, body, mixture, prompts))
        if not body.stream:
            async for _ in generation:
                pass
            return Response(
                answer.answer(generation.samples, generation.usage), media_type="application/json"
            )
        first = await anext(generation)
        return EventStream(generation, first, answer, body.include_usage, stack.pop_all())


class EventStream(Response):
    """Server-sent events: one write for all that a step brought."""

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        first: Sequence[tuple[int, Chunk]],
        answer: Format,
        include_usage: bool,
        stack: AsyncExitStack,
    ) -> None:
        """
        Args:
            first: what the generation has given already.
            stack: closes the generation.
        """
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._generation, self._first, self._answer = generation, first, answer
        self._include_usage, self._stack = include_usage, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send(self._events(self._first))
            end = b""
            try:
                async for batch in self._generation:
                    await send(self._events(batch))
                if self._include_usage:
                    end = _event(self._answer.usage_event(self._generation.usage))
            except ApiError as error:
                end = _event(msgspec.json.encode(error.body))
            await send(_part(end + b"data: [DONE]\n\n", more=False))

    def _events(self, batch: Sequence[tuple[int, Chunk]]) -> Message:
        return _part(
            b"".join(_event(self._answer.event(number, chunk)) for number, chunk in batch), more=True
        )


def _event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


def _part(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
