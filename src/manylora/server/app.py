"""The HTTP application: which route is answered by what, and every error in one shape."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from manylora.server import adapters_api, chat, completions, openapi, tokens_api
from manylora.server.api_errors import ApiError
from manylora.server.body_errors import invalid
from manylora.server.config import ServerConfig
from manylora.server.engine_client import EngineClient
from manylora.server.gate import Gate
from manylora.server.json_response import json_response
from manylora.server.metrics import CONTENT_TYPE, Metrics
from manylora.server.prompts import Prompts
from manylora.server.service import Service, require_admin
from manylora.server.tenants import Tenants
from manylora.server.token_texts import TokenTexts
from manylora.version import __version__


class Status(msgspec.Struct):
    status: str


class Version(msgspec.Struct):
    version: str


ANSWERS = (
    completions.Completion,
    chat.ChatCompletion,
    tokens_api.Tokens,
    tokens_api.Detokenized,
    adapters_api.Model,
    adapters_api.ModelList,
    adapters_api.AdapterState,
    adapters_api.AdapterDeleted,
    Status,
    Version,
)


def create_app(client: EngineClient, config: ServerConfig, tokenizer: Any) -> FastAPI:
    """Make the application of one engine.

    Args:
        client: of an engine that is ready.
        tokenizer: the base's, a transformers fast tokenizer.
    Raises:
        ConfigError: the API keys cannot be read.
    """
    service = Service(
        client=client,
        config=config,
        tenants=Tenants.load(config.api_keys),
        metrics=Metrics(client),
        prompts=Prompts(tokenizer, client.model.max_position),
        token_texts=TokenTexts(tokenizer),
    )
    app = FastAPI(
        title="manylora",
        summary="One base model, thousands of LoRA adapters, every request its own mixture.",
        version=__version__,
        docs_url=None,  # their pages fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    for part in (completions, chat, adapters_api, tokens_api):
        app.include_router(part.router(service))
    _add_operations(app, service)
    openapi.install(app, ANSWERS, asks_for_keys=service.tenants.are_asked_for)
    return app


def _add_operations(app: FastAPI, service: Service) -> None:
    """Routes for whoever runs the server."""
    client = service.client

    @app.get("/health", **openapi.described(Status))
    async def health() -> Response:
        """Whether the engine lives. A server that does not should be started anew."""
        if not client.is_alive:
            raise ApiError(503, "the engine process has ended")
        return json_response(Status("ok"))

    @app.get("/ready", **openapi.described(Status))
    async def ready() -> Response:
        """Whether new requests are taken. A server that drains finishes what it has, and should get no more."""
        if not client.is_alive or client.is_draining:
            raise ApiError(
                503, "the server is draining" if client.is_alive else "the engine process has ended"
            )
        return json_response(Status("ok"))

    @app.get("/version", **openapi.described(Version))
    async def version() -> Response:
        """manylora's version."""
        return json_response(Version(__version__))

    @app.get(
        "/metrics",
        dependencies=[Depends(require_admin)],
        **openapi.described(None, media_type="text/plain"),
    )
    async def metrics() -> Response:
        """Everything that is counted, for Prometheus."""
        return Response(await service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):  # of the framework: no such path, no such method
        text = {
            404: f"there is no path {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }
        error = ApiError(
            error.status_code, text.get(error.status_code, error.detail), headers=dict(error.headers or {})
        )
    return error.response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors(), error.body).response()
