"""`manylora demo`: pictures in few steps, and a real model that answers prompts with mixtures out of 1,000 adapters."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, track
from rich.table import Table

from manylora.cli.demo_pictures import draw_demo
from manylora.cli.demo_prompts import QUESTIONS, TRAINED, TRAINED_REQUESTS
from manylora.errors import ConfigError
from manylora.lora.mixture import Mixture

if TYPE_CHECKING:
    from manylora.lora.library import Library
    from manylora.text.engine import Engine
    from manylora.text.output import Completion

MODEL = "smollm2-135m-instruct"
SHIPPED = Path(__file__).parents[3] / "examples" / "adapters"
"""The four trained adapters, which come with the repository."""

NUM_SHOWN = 24
"""Rows of the table of answers."""


@dataclass(frozen=True)
class Request:
    prompt: str
    mixture: str | None


@dataclass(frozen=True)
class Measured:
    """One run of all requests."""

    completions: "list[Completion]"
    seconds: float
    adapters_per_step: list[int]
    kv_bytes: int
    """Most that KV held at a time."""
    adapter_bytes: int
    """Most that adapters held at a time."""

    @property
    def tokens_per_s(self) -> float:
        return sum(len(c.token_ids) for c in self.completions) / self.seconds


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    requests: Annotated[
        int, typer.Option(min=24, help="Requests in the batch, each of another mixture.")
    ] = 320,
    count: Annotated[
        int, typer.Option(min=8, help="Adapters registered: four trained, the others generated.")
    ] = 1000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    folder: Annotated[Path, typer.Option(help="Where the generated adapters are kept.")] = Path(
        "~/.cache/manylora/demo/adapters"
    ),
) -> None:
    """Show what manylora does: pictures in 32, 4 and 2 steps; then SmolLM2-135M-Instruct, 1,000 adapters, one batch.

    A small model of icons and its LoRAs make the pictures (demo/grid.png). Of the adapters, four are trained (JSON
    answers, pirate speech, SQL, headlines); the others are random and slight, made on the first run (2 GB). Fetch the
    language model first: make model.
    """
    from manylora.lora.library import Library
    from manylora.models.loading import load_model
    from manylora.models.sites import base_sites
    from manylora.models.tokenizer import load_tokenizer
    from manylora.text.config import EngineConfig
    from manylora.text.engine import Engine

    console = Console(highlight=False)
    if not SHIPPED.is_dir():
        raise ConfigError(
            f"the trained adapters should be in {SHIPPED}; run the demo from a checkout of the repository"
        )
    draw_demo(console)
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    generated = _generate(base_sites(model.config), folder.expanduser(), count - len(TRAINED))
    library = Library(SHIPPED, folder.expanduser())
    total_bytes = _check_distinct(library, [*TRAINED, *generated])
    asked = _requests(requests, generated)
    config = EngineConfig(pool_bytes=total_bytes // 4, prefix_caching=False)
    with Engine(model, tokenizer, library, config) as engine:
        mixed = _run(engine, asked, max_tokens, "each with its own mixture")
        stats = engine.stats()
    with Engine(model, tokenizer, library, config) as engine:
        base = _run(
            engine, [Request(r.prompt, None) for r in asked], max_tokens, "the same prompts, base alone"
        )
    _print_answers(console, asked, mixed.completions)
    summary = Table(title="One batch, one pool", show_header=False)
    steps = mixed.adapters_per_step
    for name, value in (
        ("adapters registered", f"{count:,} of different content, {total_bytes / 1e6:,.0f} MB"),
        ("requests, distinct mixtures", f"{len(asked)}, {len({r.mixture for r in asked})}"),
        (
            "throughput",
            f"{mixed.tokens_per_s:.0f} tokens/s over the whole time, prompts and loads included",
        ),
        (
            "share of the base alone",
            f"{mixed.tokens_per_s / base.tokens_per_s:.0%} of {base.tokens_per_s:.0f} tokens/s",
        ),
        ("adapter loads, evictions", f"{stats.adapter_loads}, {stats.adapter_evictions}"),
        ("distinct adapters in a step", f"{sum(steps) / len(steps):.0f} on average, {max(steps)} at most"),
        ("pool", f"{config.pool_bytes / 1e6:,.0f} MB: a quarter of the adapters' bytes"),
        ("most held by adapters", f"{mixed.adapter_bytes / 1e6:,.0f} MB"),
        ("most held by KV", f"{mixed.kv_bytes / 1e6:,.0f} MB"),
    ):
        summary.add_row(name, value)
    console.print(summary)


def _generate(sites: dict[str, tuple[int, int]], folder: Path, count: int) -> list[str]:
    from manylora.lora.synthetic import generate_adapters

    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as progress:
        task = progress.add_task("generating adapters", total=count)
        return generate_adapters(
            folder, sites, count, base_model=MODEL, on_written=lambda n: progress.update(task, completed=n)
        )


def _check_distinct(library: "Library", names: Sequence[str]) -> int:
    """Make sure that every adapter is of another content; returns the bytes of all."""
    identities, total = set(), 0
    for name in track(names, "hashing adapters", console=Console(stderr=True)):
        ref = library.locate(name)
        identities.add(library.load(ref).identity)
        total += ref.num_bytes
    assert len(identities) == len(names), (
        f"{len(names)} names, but only {len(identities)} different contents"
    )
    return total


def _requests(count: int, generated: Sequence[str]) -> list[Request]:
    """Real questions; the trained adapters get what they were trained for, alone and mixed, the others anything."""
    draw = random.Random(0)
    asked = [Request(prompt, mixture) for prompt, mixture in TRAINED_REQUESTS]
    asked.append(Request(QUESTIONS[0], None))
    names = draw.sample(list(generated), min(len(generated), count))
    while len(asked) < count:
        name, number = names[len(asked) % len(names)], len(asked)
        # A third of them mixtures: of a generated adapter with a trained one, or of two generated ones.
        partner = (TRAINED[number % len(TRAINED)], names[(7 * number) % len(names)])[number % 2]
        mixed = number % 3 == 0 and partner != name
        asked.append(
            Request(
                QUESTIONS[number % len(QUESTIONS)],
                f"{name}:1+{partner}:{0.25 * (1 + number % 4):g}" if mixed else name,
            )
        )
    return asked


def _run(engine: "Engine", asked: Sequence[Request], max_tokens: int, what: str) -> Measured:
    from manylora.text.output import Output, join
    from manylora.text.params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs: dict[str, list[Output]] = {}
    adapters_per_step, kv_bytes, adapter_bytes, ended = [], 0, 0, 0
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as progress:
        task = progress.add_task(what, total=len(asked))
        began = time.perf_counter()
        for number, request in enumerate(asked):
            messages = [{"role": "user", "content": request.prompt}]
            outputs[engine.submit(messages, params, request.mixture, request_id=str(number))] = []
        while engine.has_work():
            for output in engine.step():
                outputs[output.request_id].append(output)
                ended += output.event is not None
            stats = engine.stats()
            adapters_per_step.append(stats.distinct_adapters_last_step)
            kv_bytes = max(kv_bytes, stats.pool_bytes.kv_in_use)
            adapter_bytes = max(adapter_bytes, stats.pool_bytes.adapters)
            progress.update(task, completed=ended)
        seconds = time.perf_counter() - began
    completions = [join(Mixture.parse(r.mixture), outputs[str(n)]) for n, r in enumerate(asked)]
    return Measured(completions, seconds, adapters_per_step, kv_bytes, adapter_bytes)


def _print_answers(console: Console, asked: Sequence[Request], completions: "Sequence[Completion]") -> None:
    table = Table(title=f"The first {NUM_SHOWN} of {len(asked)} requests", show_lines=True)
    for heading in ("prompt", "mixture", "answer"):
        table.add_column(heading, overflow="fold")
    for request, completion in list(zip(asked, completions, strict=True))[:NUM_SHOWN]:
        answer = (
            f"[red]{escape(str(completion.error))}[/]"
            if completion.error
            else escape(completion.text.strip())
        )
        table.add_row(escape(request.prompt), request.mixture or "base", answer)
    console.print(table)
