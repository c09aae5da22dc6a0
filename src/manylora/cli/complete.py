"""`manylora complete`: answers to one prompt or to a file of them, each with its own mixture, in one batch."""

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from manylora.cli.fields import command, value_of
from manylora.errors import ConfigError
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
            rows: list[dict[str, Any]] = [{"prompt": prompt, "lora": lora}]
        else:
            if lora is not None:
                raise ConfigError('--lora goes with one prompt; with --file, each line has its own "lora"')
            rows = list(_rows(file))
            if not rows:
                raise ConfigError(f"{file} holds no request; expected one JSON object a line")
        requests = [_request(row, options, raw) for row in rows]
        engine = Engine(
            load_model(model, dtype=dtype, device=device),
            load_tokenizer(model),
            Library(*(adapters or [])),
            EngineConfig(**value_of(EngineConfig, values)),
        )
        with engine:
            prompts, params, mixtures = zip(*requests, strict=True)
            completions = engine.generate(prompts, params, mixtures)
        asked = [row for row, one in zip(rows, params, strict=True) for _ in range(one.n)]
        for row, completion in zip(asked, completions, strict=True):
            _print_json(row, completion) if as_json else _print(row, completion)
        if any(completion.error for completion in completions):
            sys.exit(1)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        # Not splitlines(): a JSON text may hold other ends of lines, U+2028 for one, as --json writes them.
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {file}: it must be in UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a character, "\ud83d", could not be printed
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: not JSON ({error})") from None
        known = {"prompt", "messages", "lora", *(field.name for field in fields(SamplingParams))}
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row) or row.keys() - known:
            raise ConfigError(
                f'{file}, line {number}: expected an object with "prompt" or "messages", and of {sorted(known)} '
                f"what is needed; got {line[:100]}"
            )
        _check_asked(row, f"{file}, line {number}")
        yield row


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
    row: dict[str, Any], options: dict[str, Any], raw: bool
) -> tuple[Any, SamplingParams, MixtureLike]:
    own = {name: value for name, value in row.items() if name not in ("prompt", "messages", "lora")}
    params = SamplingParams.from_dict({**options, **own})
    if params.max_tokens is None:
        params = SamplingParams.from_dict({**options, **own, "max_tokens": MAX_TOKENS})
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
        )
    )
