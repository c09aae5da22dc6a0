"""HTTP fields, answers, routes and metrics equal stored lists: clients and dashboards build on them.

After a change that is meant, `python -m tests.server.test_frozen` writes them anew; the diff belongs in the changelog.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import msgspec
from pydantic import BaseModel

from manylora.server import app as application
from manylora.server import protocol
from manylora.server.api_errors import ErrorBody
from manylora.server.chat import ChatChunk
from manylora.server.config import ServerConfig
from manylora.server.metrics import Metrics
from manylora.server.unsupported import UNSUPPORTED
from manylora.text.config import EngineConfig
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


def test_the_documentation_names_everything() -> None:
    """Each field, flag, route and metric stands in docs/serving.md."""
    text = (HERE.parents[1] / "docs" / "serving.md").read_text()
    ours = {name for model in BODIES for name in body_fields(model)} - UNSUPPORTED
    flags = {
        f"--{field.name.replace('_', '-')}"
        for config in (ServerConfig, EngineConfig)
        for field in fields(config)
    }
    words = (
        ours | (flags - {"--model"}) | {path.replace("{model}", "{id}") for path in stored("routes.json")}
    )
    assert len(words) > 60
    assert [
        word for word in sorted(words) if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)
    ] == []
    # Of a pair like `manylora_adapter_loads_total`, `_hits_total`, the second is named by its end.
    series = [name.rsplit("_", 1)[-1] for name in stored("metrics.json")]
    assert [end for end in series if not re.search(rf"_{end}(?![a-z])", text)] == []


def test_the_dashboard_shows_series_that_exist() -> None:
    known = set(stored("metrics.json"))
    board = json.loads((HERE.parents[1] / "docs" / "dashboards" / "grafana.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:manylora_|vllm:)\w+", target["expr"])
    }
    assert len(asked) > 15
    assert {re.sub(r"_(total|bucket)$", "", name) for name in asked} <= known


def _write() -> None:
    for name, value in {"fields.json": all_fields(), "metrics.json": all_metrics()}.items():
        (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    _write()
