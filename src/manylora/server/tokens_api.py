"""POST /tokenize and /detokenize, with the bodies of vLLM."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Body, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from manylora.server.http_body import BodyRoute
from manylora.server.json_response import json_response
from manylora.server.openapi import described
from manylora.server.protocol import DetokenizeBody, TokenizeBody, TokenizeText
from manylora.server.service import Service, context_of


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    """Tokens of the model's context."""
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET
    """As the vocabulary writes them, if asked for."""


class Detokenized(msgspec.Struct):
    prompt: str


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/tokenize", **described(Tokens))
    async def tokenize(request: Request, body: Annotated[TokenizeBody, Body()]) -> Response:
        """Return the tokens of a prompt, or of a chat as the model's template writes it."""
        await _check_model(service, request, body.model)
        if isinstance(body, TokenizeText):
            (tokens,) = await service.prompts.of_texts(
                [body.prompt], add_special_tokens=body.add_special_tokens
            )
        else:
            tokens = await service.prompts.of_chat(body)
        strings = await service.prompts.token_strings(tokens) if body.return_token_strs else UNSET
        return json_response(Tokens(len(tokens), service.client.model.max_position, tokens, strings))

    @routes.post("/detokenize", **described(Detokenized))
    async def detokenize(request: Request, body: Annotated[DetokenizeBody, Body()]) -> Response:
        """Return the text of tokens, special ones included."""
        await _check_model(service, request, body.model)
        return json_response(Detokenized(await service.prompts.text_of(body.tokens)))

    return routes


async def _check_model(service: Service, request: Request, model: str | None) -> None:
    """All mixtures share the base's tokenizer, so a name has no effect; but one that does not exist is a mistake."""
    if model is not None:
        context = context_of(request)
        for name, _ in service.mixture(context.tenant, model, None):
            await service.adapter(name, context)
