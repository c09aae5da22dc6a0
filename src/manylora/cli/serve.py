"""`manylora serve`: an OpenAI-compatible server, in which every request names its own mixture of adapters."""

from typing import Annotated, Any

import typer

from manylora.cli.fields import command, field_docs, value_of
from manylora.server.config import ServerConfig
from manylora.text.config import EngineConfig


def register(app: typer.Typer) -> None:
    @command(app, "serve", ServerConfig, EngineConfig)
    def serve(
        model: Annotated[str, typer.Argument(help=field_docs(ServerConfig)["model"])],
        adapters: Annotated[
            list[str] | None, typer.Option("--adapters", help=field_docs(ServerConfig)["adapters"])
        ] = None,
        **values: Any,
    ) -> None:
        """Serve a model over HTTP, as OpenAI's clients know it; each request names its own mixture of adapters.

        A request's `model` is the base, an adapter, or a mixture: "pirate", "pirate:0.8+json:0.5". All share each
        forward pass. Adapters are read when they are first named, so thousands cost nothing to begin with.

        Examples:

            manylora serve smollm2-135m-instruct --adapters examples/adapters

            manylora serve ./my-model --adapters ./adapters --adapters s3://bucket/adapters --host 0.0.0.0 --port 8000

            curl localhost:8000/v1/completions -H 'content-type: application/json' -d
            '{"model": "pirate:0.8+json:0.5", "prompt": "Where is Rome?", "max_tokens": 32}'
        """
        # FastAPI, uvicorn and the tokenizer: not for --help.
        from manylora.server.launch import serve as run

        config = ServerConfig(model=model, adapters=tuple(adapters or ()), **value_of(ServerConfig, values))
        raise typer.Exit(run(config, EngineConfig(**value_of(EngineConfig, values))))
