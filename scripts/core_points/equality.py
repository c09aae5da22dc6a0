"""Greedy tokens of the engine against transformers and PEFT, on the real model in float32.

96 chat prompts: a third the base, a third one of 16 adapters, a third one of 16 mixtures of 2 to 4 with weights from
-0.5 to 1.5. At the first token that differs, the oracle's own two best logits must be closer than rounding can tell
apart.
"""

import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from core_points.equality_cases import Case, make_cases, write_adapters
from core_points.equality_oracle import NUM_TOKENS, Oracle, Truth
from manylora.lora.library import Library
from manylora.models.demo_model import DEMO_MODEL, require_demo_model
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.models.tokenizer import load_tokenizer
from manylora.text import Completion, Engine, EngineConfig, SamplingParams
from points import Line

MAX_GAP = 1e-3
MIN_EQUAL = 0.98
MIN_CHANGED = 0.8
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)

AMPLE_BYTES = 1 << 30
ADAPTERS_AND_HALF_THE_KV_BYTES = 230 << 20
"""The adapters take 137 MB, the KV of all 96 requests at their ends 280 MB."""

PART_OF_THE_ADAPTERS_BYTES = 110 << 20
"""The largest mixture and its KV, but not all adapters."""

Answers = list[tuple[int, ...]]
"""Token ids, case by case."""


def lines() -> Iterator[Line]:
    torch.manual_seed(0)
    model, tokenizer = load_model(DEMO_MODEL), load_tokenizer(DEMO_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _their_model()
        names = write_adapters(theirs, Path(folder))
        cases = make_cases(tokenizer, names)
        truths, changed = _truths(Oracle(theirs, Path(folder), names), cases)
        yield Line(
            "adapters and mixtures change the answers",
            f"{changed:.0%} of sequences",
            f">= {MIN_CHANGED:.0%}",
            changed >= MIN_CHANGED,
        )
        for point, answers in ways(model, Library(folder), cases):
            yield compare(point, answers, truths)


def _truths(oracle: Oracle, cases: list[Case]) -> tuple[list[Truth], float]:
    """The oracle's answers, and the share of adapted cases that differ from the base: else equality says nothing."""
    adapted = [number for number, case in enumerate(cases) if case.mixture]
    asked = [*cases, *(Case(cases[number].tokens, {}) for number in adapted)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("transformers and PEFT", total=len(asked))
        truths = oracle.decode(asked, lambda done: progress.update(task, completed=done))
    of_base = truths[len(cases) :]
    changed = [truths[number].tokens != base.tokens for number, base in zip(adapted, of_base, strict=True)]
    return truths[: len(cases)], sum(changed) / len(changed)


def ways(model: Llama, library: Library, cases: list[Case]) -> Iterator[tuple[str, Answers | None]]:
    """Every way in which the engine may come to serve the cases; None where it did not come about."""
    with _engine(model, library, AMPLE_BYTES) as engine:
        yield "tokens equal PEFT's: one shuffled batch", together(engine, cases)
    with _engine(model, library, AMPLE_BYTES) as engine:
        yield "tokens equal PEFT's: each alone", alone(engine, cases)
    with _engine(model, library, AMPLE_BYTES, prefix_caching=True) as engine:
        together(engine, cases)
        answers, hits = together(engine, cases), engine.stats().prefix_hit_tokens
        yield f"tokens equal PEFT's: {hits} tokens from the prefix cache", answers if hits else None
    with _engine(model, library, ADAPTERS_AND_HALF_THE_KV_BYTES) as engine:
        answers, num = together(engine, cases), engine.stats().num_preemptions
        yield f"tokens equal PEFT's: {num} preemptions", answers if num else None
    with _engine(model, library, PART_OF_THE_ADAPTERS_BYTES) as engine:
        answers, stats = together(engine, cases), engine.stats()
        yield (
            f"tokens equal PEFT's: {stats.adapter_evictions} evictions, {stats.adapter_loads} loads",
            answers if stats.adapter_evictions else None,
        )


def _engine(model: Llama, library: Library, pool_bytes: int, *, prefix_caching: bool = False) -> Engine:
    return Engine(model, None, library, EngineConfig(pool_bytes=pool_bytes, prefix_caching=prefix_caching))


def together(engine: Engine, cases: list[Case]) -> Answers:
    """All at once, in another order than the oracle's."""
    shuffled = random.Random(1).sample(range(len(cases)), len(cases))
    prompts, mixtures = [cases[i].tokens for i in shuffled], [cases[i].mixture for i in shuffled]
    done = map(_answer, engine.generate(prompts, PARAMS, mixtures))
    by_case = dict(zip(shuffled, done, strict=True))
    return [by_case[i] for i in range(len(cases))]


def alone(engine: Engine, cases: list[Case]) -> Answers:
    """One at a time."""
    return [_answer(engine.generate([case.tokens], PARAMS, [case.mixture])[0]) for case in cases]


def _answer(completion: Completion) -> tuple[int, ...]:
    if completion.error is not None:
        raise completion.error
    return completion.token_ids


def compare(point: str, got: Answers | None, truths: list[Truth]) -> Line:
    if got is None:
        return Line(point, "did not happen", "must happen", False)
    parted = (_gap_where_they_part(tokens, truth) for tokens, truth in zip(got, truths, strict=True))
    gaps = [gap for gap in parted if gap is not None]
    equal = 1 - len(gaps) / len(truths)
    worst = max(gaps, default=0.0)
    return Line(
        point,
        f"{equal:.1%} of {len(truths)} equal; first differences: {len(gaps)}, gap <= {worst:.1e}",
        f">= {MIN_EQUAL:.0%}, gaps < {MAX_GAP:g}",
        equal >= MIN_EQUAL and worst < MAX_GAP,
    )


def _gap_where_they_part(tokens: tuple[int, ...], truth: Truth) -> float | None:
    """The oracle's gap at the first token that differs; None if none does, infinite if one answer ends too early."""
    if tokens == truth.tokens:
        return None
    for ours, theirs, gap in zip(tokens, truth.tokens, truth.gaps, strict=False):
        if ours != theirs:
            return gap
    return math.inf


def _their_model() -> Any:
    path = require_demo_model()
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
