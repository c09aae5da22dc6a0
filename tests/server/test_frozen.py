"""HTTP fields, answers, routes and metrics equal stored lists: clients and dashboards build on them.

After a change that is meant, `python -m tests.server.test_frozen` writes them anew; the diff belongs in the changelog.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
from pydantic import BaseModel

from manylora.server import app as application
from manylora.server import protocol
from manylora.server.api_errors import ErrorBody
from manylora.server.chat import ChatChunk
from manylora.server.metrics import Metrics
from tests.server.test_metrics import Double

HERE = Path(__file__).parent
BODIES = (
    protocol.CompletionBody,
    protocol.ChatBody,
    protocol.TokenizeText,
    protocol.TokenizeChat,
    protocol.DetokenizeBody,
    protocol.LoadAdapterBody,
    protocol.AdapterName,
)


def body_fields(model: type[BaseModel]) -> list[str]:
    return sorted(field.alias or name for name, field in model.model_fields.items())


def all_fields() -> dict[str, Any]:
    """Fields of bodies by model, and of answers by struct, those within them too."""
    structs = msgspec.json.schema_components([*application.ANSWERS, ChatChunk, ErrorBody])[1]
    return {
        "bodies": {model.__name__: body_fields(model) for model in BODIES},
        "answers": {name: sorted(schema["properties"]) for name, schema in sorted(structs.items())},
    }


def all_metrics() -> dict[str, Any]:
    """Series by name, with their type and labels."""
    metrics = Metrics(Double(num_resident=1))  # type: ignore[arg-type]
    asyncio.run(metrics.exposition())  # asks the engine which adapters are resident
    declared = {
        one._name: list(one._labelnames) for one in vars(metrics).values() if hasattr(one, "_labelnames")
    }
    told = {}
    for family in sorted(metrics._registry.collect(), key=lambda family: family.name):
        if not family.name.startswith(("process_", "python_")):
            shown = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
            told[family.name] = {"type": family.type, "labels": declared.get(family.name, shown)}
    return told


def stored(name: str) -> Any:
    return json.loads((HERE / name).read_text())


def test_fields_are_frozen() -> None:
    assert all_fields() == stored("fields.json")


def test_metrics_are_frozen() -> None:
    assert all_metrics() == stored("metrics.json")


def test_routes_are_frozen(api: httpx.Client) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {path: sorted(methods) for path, methods in sorted(paths.items())} == stored("routes.json")


def test_every_answer_of_the_document_is_described(api: httpx.Client) -> None:
    """References lead somewhere, and no route promises an error of the framework's shape."""
    text = api.get("/openapi.json").text
    document = json.loads(text)
    schemas = document["components"]["schemas"]
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert "ErrorBody" in references
    assert references <= schemas.keys()
    assert "HTTPValidationError" not in text
    for path, methods in document["paths"].items():
        for method in methods.values():
            assert {"200", "default"} < method["responses"].keys(), path
            assert "422" not in method["responses"], path


def _write() -> None:
    for name, value in {"fields.json": all_fields(), "metrics.json": all_metrics()}.items():
        (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    _write()
