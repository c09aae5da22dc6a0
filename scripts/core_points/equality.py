"""Greedy tokens of the engine against transformers and PEFT, on the real model in float32.

96 chat prompts: a third the base, a third one of 16 adapters, a third one of 16 mixtures of 2 to 4 with weights from
-0.5 to 1.5. The oracle decodes each prompt alone: the base as it is, an adapter through PEFT, a mixture as a copy of
the base to which the float64 sum of PEFT's weighted deltas was added. At the first token that differs, the oracle's own
two best logits must be closer than rounding can tell apart.
"""

import itertools
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM

from core_points.line import Line
from manylora.cli.demo_prompts import QUESTIONS
from manylora.lora.library import Library
from manylora.models.demo_model import DEMO_MODEL, require_demo_model
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.models.tokenizer import load_tokenizer
from manylora.text import Engine, EngineConfig, SamplingParams

NUM_PROMPTS = 96
NUM_TOKENS = 24
END_OF_ANSWER = 2
MAX_GAP = 1e-3
MIN_EQUAL = 0.98

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = (
    ATTENTION,
    ("q_proj", "v_proj"),
    (*ATTENTION, *MLP),
    MLP,
    ("down_proj", "o_proj"),
    ("k_proj", "gate_proj"),
)
RANKS = (4, 8, 5, 16, 64, 32, 7, 12)

STYLES = ("", " Answer in one sentence.", " Explain it to a child.", " Be brief.", " Why do you think so?")


@dataclass(frozen=True)
class Case:
    tokens: list[int]
    mixture: dict[str, float]


@dataclass(frozen=True)
class Truth:
    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    """Between the two best logits at each token."""


def lines() -> Iterator[Line]:
    torch.manual_seed(0)
    model, tokenizer = load_model(DEMO_MODEL), load_tokenizer(DEMO_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _their_model()
        names = _write_adapters(theirs, Path(folder))
        cases = _cases(tokenizer, names)
        oracle = Oracle(theirs, Path(folder), names)
        truths = [
            oracle.decode(case)
            for case in track(cases, "transformers and PEFT", console=Console(stderr=True))
        ]
        changed = _share_changed(oracle, cases, truths)
        yield Line(
            "adapters and mixtures change the answers",
            f"{changed:.0%} of sequences",
            ">= 80 %",
            changed >= 0.8,
        )
        for point, outcome in _ways(model, Library(folder), cases):
            yield _compare(point, outcome, truths)


def _ways(model: Llama, library: Library, cases: list[Case]) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Every way in which the engine may come to serve the cases. Each shows that it happened."""
    shuffled = random.Random(1).sample(range(len(cases)), len(cases))

    def together(engine: Engine) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        done = engine.generate(
            [cases[i].tokens for i in shuffled], params, [cases[i].mixture for i in shuffled]
        )
        by_case = dict(zip(shuffled, done, strict=True))
        return [by_case[i].token_ids for i in range(len(cases))]

    def alone(engine: Engine) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        return [engine.generate([c.tokens], params, [c.mixture])[0].token_ids for c in cases]

    roomy = EngineConfig(pool_bytes=1 << 30, prefix_caching=False)
    with Engine(model, None, library, roomy) as engine:
        yield "tokens equal PEFT's: one shuffled batch", together(engine)
    with Engine(model, None, library, roomy) as engine:
        yield "tokens equal PEFT's: each alone", alone(engine)
    with Engine(model, None, library, EngineConfig(pool_bytes=1 << 30)) as engine:
        together(engine)
        outcome, hits = together(engine), engine.stats().prefix_hit_tokens
        yield f"tokens equal PEFT's: {hits} tokens from the prefix cache", outcome if hits else []
    with Engine(model, None, library, EngineConfig(pool_bytes=230 << 20, prefix_caching=False)) as engine:
        outcome, stats = together(engine), engine.stats()
        happened = stats.num_preemptions > 0
        yield f"tokens equal PEFT's: {stats.num_preemptions} preemptions", outcome if happened else []
    with Engine(model, None, library, EngineConfig(pool_bytes=180 << 20, prefix_caching=False)) as engine:
        outcome, stats = alone(engine), engine.stats()
        yield (
            f"tokens equal PEFT's: {stats.adapter_evictions} evictions, {stats.adapter_loads} loads",
            (outcome if stats.adapter_evictions else []),
        )


def _compare(point: str, got: list[tuple[int, ...]], truths: list[Truth]) -> Line:
    if not got:
        return Line(point, "did not happen", "must happen", False)
    gaps = [
        gap
        for tokens, truth in zip(got, truths, strict=True)
        if (gap := _gap_where_they_part(tokens, truth)) is not None
    ]
    equal = 1 - len(gaps) / len(truths)
    worst = max(gaps, default=0.0)
    return Line(
        point,
        f"{equal:.1%} of {len(truths)} equal; first differences: {len(gaps)}, gap <= {worst:.1e}",
        f">= {MIN_EQUAL:.0%}, gaps < {MAX_GAP:g}",
        equal >= MIN_EQUAL and worst < MAX_GAP,
    )


def _gap_where_they_part(tokens: tuple[int, ...], truth: Truth) -> float | None:
    """The oracle's gap at the first token that differs; None if none does."""
    if tokens == truth.tokens:
        return None
    for ours, theirs, gap in zip(tokens, truth.tokens, truth.gaps, strict=False):
        if ours != theirs:
            return gap
    raise AssertionError("one sequence is the beginning of the other")


def _share_changed(oracle: "Oracle", cases: list[Case], truths: list[Truth]) -> float:
    """Share of the adapted cases whose answer is not the base's: else equality would say nothing."""
    adapted = [(c, t) for c, t in zip(cases, truths, strict=True) if c.mixture][::4]
    return sum(oracle.decode(Case(c.tokens, {})).tokens != t.tokens for c, t in adapted) / len(adapted)


def _cases(tokenizer: Any, names: list[str]) -> list[Case]:
    draw = random.Random(0)
    mixtures = [
        {name: draw.uniform(-0.5, 1.5) for name in draw.sample(names, draw.choice((2, 3, 4)))}
        for _ in range(16)
    ]
    prompts = [question + style for question, style in itertools.product(QUESTIONS, STYLES)][:NUM_PROMPTS]
    cases = []
    for number, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        which = number // 3 % 16
        cases.append(Case(tokens, ({}, {names[which]: 1.0}, mixtures[which])[number % 3]))
    return cases


def _their_model() -> Any:
    path = require_demo_model()
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def _write_adapters(model: Any, folder: Path) -> list[str]:
    """Make 16 adapters with PEFT, B other than zero, and save them as PEFT does; returns their names."""
    names = []
    for number in range(16):
        rank, targets = RANKS[number % len(RANKS)], TARGETS[number % len(TARGETS)]
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if number != 3 else 8,
            target_modules=list(targets),
            use_rslora=number == 3,
            rank_pattern={r"layers\.[0-9]\.self_attn\.q_proj": 2} if number == 6 else {},
        )
        name = f"adapter-{number:02d}"
        adapted = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(number)
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.03, generator=generator)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()
        names.append(name)
    return names


class Oracle:
    """transformers and PEFT, one prompt at a time."""

    def __init__(self, model: Any, folder: Path, names: list[str]) -> None:
        self.peft = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            self.peft.load_adapter(folder / name, adapter_name=name)
        self.peft.eval()

    def decode(self, case: Case) -> Truth:
        match list(case.mixture.items()):
            case []:
                with self.peft.disable_adapter():
                    return self._greedy(case.tokens)
            case [(name, 1.0)]:
                self.peft.set_adapter(name)
                return self._greedy(case.tokens)
            case weighted:
                with self._merged(weighted), self.peft.disable_adapter():
                    return self._greedy(case.tokens)

    @contextmanager
    def _merged(self, weighted: list[tuple[str, float]]) -> Iterator[None]:
        """The base with the float64 sum of the weighted deltas added to its weights, for a while."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for module in self.peft.modules():
            if not isinstance(module, LoraLayer):
                continue
            weight = module.get_base_layer().weight.data
            delta = torch.zeros_like(weight, dtype=torch.float64)
            for name, factor in weighted:
                if name in module.lora_A:
                    delta += factor * module.get_delta_weight(name).double()
            kept.append((weight, weight.clone()))
            weight.copy_(weight.double() + delta)
        try:
            yield
        finally:
            for weight, before in kept:
                weight.copy_(before)

    @torch.inference_mode()
    def _greedy(self, prompt: list[int]) -> Truth:
        tokens: list[int] = []
        gaps: list[float] = []
        ids, cache = torch.tensor([prompt]), None
        for _ in range(NUM_TOKENS):
            out = self.peft(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = out.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            if tokens[-1] == END_OF_ANSWER:
                break
            ids = best.indices[:1][None]
        return Truth(tuple(tokens), tuple(gaps))
