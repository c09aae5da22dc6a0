"""The real openai client against the real server on SmolLM2: 64 requests at a time, 48 distinct mixtures among them.

Chat and completions, streamed and not, named in `model` and in `lora`. What comes must be what the engine answers
without a server; at the first token that differs, the engine's own two best must be closer than rounding can tell.
"""

import asyncio
import itertools
import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, NotFoundError

from core_points.equality import MAX_GAP, MIN_CHANGED, MIN_EQUAL
from core_points.equality_cases import STRENGTH, STYLES
from manylora.bench.adapters import adapter_name, write_adapters
from manylora.bench.serve.server import started_server
from manylora.cli.demo_prompts import QUESTIONS
from manylora.lora.library import Library
from manylora.models.demo_model import DEMO_MODEL
from manylora.models.loading import load_model
from manylora.models.sites import base_sites
from manylora.models.tokenizer import load_tokenizer
from manylora.text import Completion, Engine, EngineConfig, SamplingParams
from points import Line
from server_points.served import openai_client

NUM_REQUESTS = 64
NUM_ADAPTERS = 16
NUM_TOKENS = 24
RANKS = (4, 8, 5, 16)


@dataclass(frozen=True)
class Case:
    messages: tuple[dict[str, str], ...]
    tokens: tuple[int, ...]
    """What the template makes of them."""

    mixture: dict[str, float]
    is_chat: bool
    streams: bool
    in_model: bool
    """The mixture is named in `model`, not in `lora`."""

    @property
    def names(self) -> dict[str, Any]:
        """What says the mixture, as arguments of the client."""
        if not self.mixture or self.in_model:
            written = "+".join(f"{name}:{weight}" for name, weight in self.mixture.items())
            return {"model": written or "base"}
        return {"model": "base", "extra_body": {"lora": self.mixture}}


def lines() -> Iterator[Line]:
    model, tokenizer = load_model(DEMO_MODEL), load_tokenizer(DEMO_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(
            Path(folder), base_sites(model.config), NUM_ADAPTERS, RANKS, seed=5, strength=STRENGTH
        )
        cases = make_cases(tokenizer)
        wanted, changed = _offline(model, tokenizer, Path(folder), cases)
        del model
        yield Line(
            "adapters and mixtures change the answers",
            f"{changed:.0%} of sequences",
            f">= {MIN_CHANGED:.0%}",
            changed >= MIN_CHANGED,
        )
        names = [adapter_name(number) for number in range(NUM_ADAPTERS)]
        with started_server(DEMO_MODEL, Path(folder), names, 1, []) as server:
            client = openai_client(server)
            got, listed, unknown = asyncio.run(_ask(client, cases))
    yield Line(
        "/v1/models: the base, and each adapter with its parent",
        f"{len(listed)} adapters",
        f"{NUM_ADAPTERS}",
        listed == dict.fromkeys(names, "base"),
    )
    yield Line("a name that nobody has", unknown, "404, NotFoundError", unknown == "NotFoundError 404")
    mixtures = {tuple(sorted(case.mixture.items())) for case in cases if case.mixture}
    for point, chosen in {
        "chat": [case.is_chat for case in cases],
        "completions": [not case.is_chat for case in cases],
        "streamed": [case.streams for case in cases],
        "not streamed": [not case.streams for case in cases],
        f"all 64 at a time, {len(mixtures)} distinct mixtures": [True] * len(cases),
    }.items():
        yield _compare(
            point, *zip(*itertools.compress(zip(got, wanted, strict=True), chosen), strict=True), tokenizer
        )


def make_cases(tokenizer: Any) -> list[Case]:
    """16 of the base, 16 of an adapter each, 32 of a mixture of two to four each; each way to ask in turn."""
    draw = random.Random(2)
    names = [adapter_name(number) for number in range(NUM_ADAPTERS)]
    mixtures: list[dict[str, float]] = [{} for _ in range(16)] + [{name: 1.0} for name in names]
    for number in range(32):
        chosen = draw.sample(names, 2 + number % 3)
        mixtures.append({name: round(draw.uniform(-0.5, 1.5), 3) for name in chosen})
    prompts = [question + style for question, style in itertools.product(QUESTIONS, STYLES)]
    cases = []
    for number, (mixture, prompt) in enumerate(
        zip(mixtures, draw.sample(prompts, NUM_REQUESTS), strict=True)
    ):
        messages = ({"role": "user", "content": prompt},)
        tokens = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        ways = (number % 2 == 0, number // 2 % 2 == 0, number // 4 % 2 == 0)
        cases.append(Case(messages, tuple(tokens), mixture, *ways))
    return draw.sample(cases, len(cases))


def _offline(model: Any, tokenizer: Any, folder: Path, cases: list[Case]) -> tuple[list[Completion], float]:
    """The engine's answers without a server, and the share of adapted ones that differ from the base's."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=2)
    adapted = [number for number, case in enumerate(cases) if case.mixture]
    with Engine(model, tokenizer, Library(folder), EngineConfig()) as engine:
        answers = engine.generate([case.tokens for case in cases], params, [case.mixture for case in cases])
        of_base = engine.generate([cases[number].tokens for number in adapted], params)
    changed = [answers[i].token_ids != base.token_ids for i, base in zip(adapted, of_base, strict=True)]
    return answers, sum(changed) / len(changed)


async def _ask(client: AsyncOpenAI, cases: list[Case]) -> tuple[list[str], dict[str, str], str]:
    """Texts of all cases, asked at a time; the adapters that are listed, with parents; what an unknown name brings."""
    async with client:
        texts = await asyncio.gather(*(_answer(client, case) for case in cases))
        models = (await client.models.list()).data
        try:
            await client.completions.create(model="nobody", prompt="x")
            unknown = "an answer"
        except NotFoundError as error:
            unknown = f"{type(error).__name__} {error.status_code}"
    parents = {model.id: (model.model_extra or {}).get("parent") for model in models}
    return texts, {name: parent for name, parent in parents.items() if parent is not None}, unknown


async def _answer(client: AsyncOpenAI, case: Case) -> str:
    settings: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "stream": case.streams,
        **case.names,
    }
    if case.is_chat:
        answer = await client.chat.completions.create(messages=list(case.messages), **settings)
    else:
        answer = await client.completions.create(prompt=list(case.tokens), **settings)
    if not case.streams:
        choice = answer.choices[0]
        return str(choice.message.content if case.is_chat else choice.text)
    pieces = []
    async for event in answer:
        for choice in event.choices:
            pieces.append((choice.delta.content if case.is_chat else choice.text) or "")
    return "".join(pieces)


def _compare(point: str, got: tuple[str, ...], wanted: tuple[Completion, ...], tokenizer: Any) -> Line:
    parted = (
        _gap_where_they_part(text, answer, tokenizer) for text, answer in zip(got, wanted, strict=True)
    )
    gaps = [gap for gap in parted if gap is not None]
    equal, worst = 1 - len(gaps) / len(got), max(gaps, default=0.0)
    return Line(
        f"answers equal the offline engine's: {point}",
        f"{equal:.1%} of {len(got)} equal; gap where they part <= {worst:.1e}",
        f">= {MIN_EQUAL:.0%}, gaps < {MAX_GAP:g}",
        equal >= MIN_EQUAL and worst < MAX_GAP,
    )


def _gap_where_they_part(text: str, answer: Completion, tokenizer: Any) -> float | None:
    """Between the engine's two best at the first token that the text does not go on with; None if they are equal."""
    if text == answer.text:
        return None
    for number, logprobs in enumerate(answer.logprobs):
        # Half a character at the end of a prefix is no difference.
        prefix = tokenizer.decode(answer.token_ids[: number + 1], skip_special_tokens=True).rstrip("\ufffd")
        if not text.startswith(prefix):
            (_, best), (_, second) = logprobs.top[:2]
            return best - second
    return math.inf  # the one ended before the other
