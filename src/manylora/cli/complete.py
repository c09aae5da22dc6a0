"""`manylora complete`: answers to one prompt or to a file of them, each with its own mixture, in one batch."""

import json
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from manylora.cli.fields import command, value_of
from manylora.errors import ConfigError, RequestError
from manylora.json_lines import json_lines
from manylora.lora.mixture import MixtureLike
from manylora.text.config import EngineConfig
from manylora.text.output import Completion
from manylora.text.params import SamplingParams

MAX_TOKENS = 128
"""Where neither the option nor the row says."""


def register(app: typer.Typer) -> None:
    @command(app, "complete", SamplingParams, EngineConfig)
    def complete(
        model: Annotated[
            str,
            typer.Argument(help="Base model: a folder, a GGUF file, a hub id, or smollm2-135m-instruct."),
        ],
        prompt: Annotated[str | None, typer.Argument(help="The prompt; or give --file.")] = None,
        lora: Annotated[
            str | None, typer.Option("--lora", help="Mixture for the prompt, e.g. alice:0.8+bob:0.5.")
        ] = None,
        adapters: Annotated[
            list[str] | None,
            typer.Option("--adapters", help="Folder or URL that holds adapters; repeatable."),
        ] = None,
        file: Annotated[
            Path | None,
            typer.Option(
                "--file",
                help='JSONL, one request a line: {"prompt": .. or "messages": [..], "lora": "a:1+b:0.5"}, and any '
                "sampling option by name.",
            ),
        ] = None,
        raw: Annotated[
            bool, typer.Option("--raw", help="Take prompts as plain text, not as a chat message.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
        dtype: Annotated[
            str,
            typer.Option(
                "--dtype",
                help="Of base weights and KV: float32, bfloat16, float16; int8: faster on a CPU, coarser.",
            ),
        ] = "float32",
        device: Annotated[str, typer.Option("--device", help="Where to run: cpu, cuda.")] = "cpu",
        **values: Any,
    ) -> None:
        """Answer prompts, each with its own mixture of adapters, all in one batch.

        Answers come in the order of the lines, each as soon as it and those before it are done.

        Examples:

            manylora complete smollm2-135m-instruct "Where is Rome?" --adapters examples/adapters --lora pirate

            manylora complete smollm2-135m-instruct --file requests.jsonl --adapters ./adapters --temperature 0
        """
        from manylora.lora.library import Library
        from manylora.models.loading import load_model
        from manylora.models.tokenizer import load_tokenizer
        from manylora.text.engine import Engine

        if (prompt is None) == (file is None):
            raise ConfigError("give either a prompt or --file, and not both")
        options = value_of(SamplingParams, values)
        if file is None:
            rows: list[tuple[str, dict[str, Any]]] = [("", {"prompt": prompt, "lora": lora})]
        else:
            if lora is not None:
                raise ConfigError('--lora goes with one prompt; with --file, each line has its own "lora"')
            rows = list(_rows(file))
            if not rows:
                raise ConfigError(f"{file} holds no request; expected one JSON object a line")
        requests = [_request(row, where, options, raw) for where, row in rows]
        engine = Engine(
            load_model(model, dtype=dtype, device=device),
            load_tokenizer(model),
            Library(*(adapters or [])),
            EngineConfig(**value_of(EngineConfig, values)),
        )
        prompts, params, mixtures = zip(*requests, strict=True)
        asked = [row for (_, row), one in zip(rows, params, strict=True) for _ in range(one.n)]
        has_failed = False
        with engine:
            for row, completion in zip(asked, engine.completions(prompts, params, mixtures), strict=True):
                _print_json(row, completion) if as_json else _print(row, completion)
                has_failed |= completion.error is not None
        if has_failed:
            sys.exit(1)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place."""
    known = {"prompt", "messages", "lora", *(field.name for field in fields(SamplingParams))}
    for where, row in json_lines(file):
        if ("prompt" in row) == ("messages" in row) or row.keys() - known:
            raise ConfigError(
                f'{where}: expected an object with "prompt" or "messages", and of {sorted(known)} what is needed; '
                f"got {str(row)[:100]}"
            )
        _check_asked(row, where)
        yield where, row


def _check_asked(row: dict[str, Any], where: str) -> None:
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise ConfigError(f'{where}: "prompt" must be a text, got {row["prompt"]!r}')
        return
    messages = row["messages"]
    # What a message must hold, the model's chat template says.
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ConfigError(f'{where}: "messages" must be a list of objects, one at least, got {messages!r}')


def _request(
    row: dict[str, Any], where: str, options: dict[str, Any], raw: bool
) -> tuple[Any, SamplingParams, MixtureLike]:
    own = {name: value for name, value in row.items() if name not in ("prompt", "messages", "lora")}
    try:
        params = SamplingParams.from_dict({**options, **own})
    except RequestError as error:
        raise RequestError(f"{where}: {error}" if where else str(error)) from None
    if params.max_tokens is None:
        params = replace(params, max_tokens=MAX_TOKENS)
    if "messages" in row:
        prompt = row["messages"]
    else:
        prompt = row["prompt"] if raw else [{"role": "user", "content": row["prompt"]}]
    return prompt, params, row.get("lora")


def _print(row: dict[str, Any], completion: Completion) -> None:
    console = Console(highlight=False, soft_wrap=True)
    asked = row["prompt"] if "prompt" in row else row["messages"][-1].get("content", "")
    console.print(f"[bold]{escape(str(asked))}[/]  [dim]{escape(str(row.get('lora') or 'base'))}[/]")
    if completion.error is not None:
        console.print(f"[red]{type(completion.error).__name__}: {escape(str(completion.error))}[/]\n")
    else:
        console.print(escape(completion.text) + "\n")


def _print_json(row: dict[str, Any], completion: Completion) -> None:
    print(
        json.dumps(
            {
                **row,
                "index": completion.index,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "num_tokens": len(completion.token_ids),
                "error": None if completion.error is None else str(completion.error),
            },
            ensure_ascii=False,
        ),
        flush=True,
    )
