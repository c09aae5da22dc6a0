"""What every route needs, and what is known of one request while it is answered."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from fastapi import Request

from manylora.server.api_errors import ApiError, from_engine, no_such_model
from manylora.server.config import ServerConfig
from manylora.server.engine_client import EngineClient, EngineError
from manylora.server.metrics import Metrics
from manylora.server.naming import Weights, weights_of
from manylora.server.prompts import Prompts
from manylora.server.tenants import Tenant, Tenants
from manylora.server.token_texts import TokenTexts


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one server."""

    client: EngineClient
    config: ServerConfig
    tenants: Tenants
    metrics: Metrics
    prompts: Prompts
    token_texts: TokenTexts
    serial: Iterator[int] = field(default_factory=count)
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def base(self) -> str:
        """What requests call the base."""
        return self.config.served_model_name or self.client.model.name

    def mixture(self, tenant: Tenant, model: str, lora: Iterable[tuple[str, float]] | None) -> Weights:
        """Return which adapters a request names.

        Raises:
            ApiError: 400, see naming.weights_of; 404 for one that does not exist for the tenant. Whether it exists for
                others is not looked at, so that neither the answer nor its time can tell.
        """
        weights = weights_of(model, lora, base=self.base)
        names = [name for name, _ in weights]
        if not all(map(tenant.sees, names)):
            raise no_such_model(names)
        return weights

    async def adapter(self, name: str, context: Context) -> dict[str, Any]:
        """Return what the engine knows of an adapter.

        Raises:
            ApiError: 404 if it does not exist, or not for the tenant.
        """
        if not context.tenant.sees(name):
            raise no_such_model([name])
        try:
            return await self.client.adapter_info(name)
        except EngineError as error:
            raise from_engine(
                error.info, began=False, request_id=context.request_id, adapters=[name]
            ) from None


@dataclass(slots=True)
class Context:
    """One request."""

    request_id: str
    tenant: Tenant
    began: float = field(default_factory=time.monotonic)
    fields: dict[str, Any] = field(default_factory=dict)
    """What its line in the log says besides."""


def context_of(request: Request) -> Context:
    context: Context = request.state.context
    return context


def require_admin(request: Request) -> None:
    """A dependency of the routes that administer.

    Raises:
        ApiError: 403.
    """
    if not context_of(request).tenant.is_admin:
        raise ApiError(403, "this endpoint needs an API key with admin rights")
