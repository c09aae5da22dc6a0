"""Which models there are, and the adapters among them managed while the server runs. Bodies are those of vLLM."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Body, Depends, Request
from starlette.responses import Response

from manylora.server.api_errors import ApiError, from_engine
from manylora.server.engine_client import EngineError
from manylora.server.http_body import BodyRoute
from manylora.server.json_response import json_response
from manylora.server.openapi import described
from manylora.server.protocol import AdapterName, LoadAdapterBody
from manylora.server.service import Context, Service, context_of, require_admin

T = TypeVar("T")


class Model(msgspec.Struct):
    """The base or an adapter."""

    id: str
    """What a request's `model` names."""
    created: int
    """When the server began."""
    root: str
    """The base's name, or the adapter's: its path below a root unless it was loaded under another name."""
    parent: str | None
    """The base that an adapter changes; null for the base itself."""
    max_model_len: int
    """Tokens of the context."""
    object: str = "model"
    owned_by: str = "manylora"


class ModelList(msgspec.Struct):
    data: list[Model]
    object: str = "list"


class AdapterState(msgspec.Struct):
    """An adapter after it was loaded, unloaded, pinned or unpinned."""

    id: str
    resident: bool
    """Whether its weights are in the pool."""
    pinned: bool
    num_bytes: int
    """Of its weights."""
    object: str = "lora_adapter"


class AdapterDeleted(msgspec.Struct):
    id: str
    deleted: bool = True
    object: str = "lora_adapter"


def router(service: Service) -> APIRouter:
    """Reading is for everybody, as far as they see an adapter; changing is for administrators."""
    routes = APIRouter(route_class=BodyRoute)
    admin = [Depends(require_admin)]
    client = service.client

    @routes.get("/v1/models", **described(ModelList))
    async def list_models(request: Request) -> Response:
        """List the base and the adapters that the API key sees."""
        context = context_of(request)
        names = await _asked(client.names(), context)
        seen = [name for name in names if context.tenant.sees(name)]
        return json_response(ModelList([_model(service), *(_model(service, name) for name in seen)]))

    @routes.get("/v1/models/{model:path}", **described(Model))
    async def get_model(request: Request, model: str) -> Response:
        """Return the base or an adapter."""
        if model == service.base:
            return json_response(_model(service))
        await service.adapter(model, context_of(request))
        return json_response(_model(service, model))

    @routes.post("/v1/load_lora_adapter", dependencies=admin, **described(AdapterState))
    async def load_lora_adapter(request: Request, body: Annotated[LoadAdapterBody, Body()]) -> Response:
        """Read and check an adapter below a root, and give it the name. A name that exists is pointed anew: requests
        under way keep what they had, later ones get the new."""
        if body.lora_name == service.base:
            raise ApiError(
                400, f"{service.base!r} is the base; an adapter needs another name", param="lora_name"
            )
        load = client.load_adapter(body.lora_name, body.lora_path)
        return _state(await _asked(load, context_of(request)))

    @routes.post("/v1/unload_lora_adapter", dependencies=admin, **described(AdapterDeleted))
    async def unload_lora_adapter(request: Request, body: Annotated[AdapterName, Body()]) -> Response:
        """Forget a name. Requests under way end first; then the adapter's bytes are free. Files stay."""
        await _asked(client.unload_adapter(body.lora_name), context_of(request))
        return json_response(AdapterDeleted(body.lora_name))

    @routes.post("/v1/pin_lora_adapter", dependencies=admin, **described(AdapterState))
    async def pin_lora_adapter(request: Request, body: Annotated[AdapterName, Body()]) -> Response:
        """Keep an adapter in the pool; it is loaded if need be."""
        await _asked(client.pin(body.lora_name), context_of(request))
        return _state(await _asked(client.adapter_info(body.lora_name), context_of(request)))

    @routes.post("/v1/unpin_lora_adapter", dependencies=admin, **described(AdapterState))
    async def unpin_lora_adapter(request: Request, body: Annotated[AdapterName, Body()]) -> Response:
        """Let an adapter leave the pool when others need the room."""
        await _asked(client.unpin(body.lora_name), context_of(request))
        return _state(await _asked(client.adapter_info(body.lora_name), context_of(request)))

    return routes


def _model(service: Service, adapter: str | None = None) -> Model:
    name, parent = (service.base, None) if adapter is None else (adapter, service.base)
    return Model(name, service.started, name, parent, service.client.model.max_position)


def _state(info: dict[str, Any]) -> Response:
    return json_response(AdapterState(info["name"], info["resident"], info["pinned"], info["num_bytes"]))


async def _asked(answer: Awaitable[T], context: Context) -> T:
    """What the engine answers. Its own words go out unchanged: only administrators ask about adapters by name here."""
    try:
        return await answer
    except EngineError as error:
        context.fields["error"] = f"{error.kind}: {error}"
        if error.kind == "AdapterNotFoundError":
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
        raise from_engine(error.info, began=False, request_id=context.request_id) from None
