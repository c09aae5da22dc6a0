"""What the engine and the oracle both decode: chat prompts and generated adapters of many shapes."""

import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from manylora.cli.demo_prompts import QUESTIONS

NUM_PROMPTS = 96
STRENGTH = 0.2
"""Standard deviation of what a site's output gains, for inputs of unit variance, whatever rank and scaling."""

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
    tokens: tuple[int, ...]
    mixture: dict[str, float]


def make_cases(tokenizer: Any, names: list[str]) -> list[Case]:
    """In turn the base, one adapter, one mixture of 2 to 4; 16 adapters and 16 mixtures, two prompts each."""
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
        cases.append(Case(tuple(tokens), ({}, {names[which]: 1.0}, mixtures[which])[number % 3]))
    return cases


def write_adapters(model: Any, folder: Path) -> list[str]:
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
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                _fill_b(module, generator)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()
        names.append(name)
    return names


def _fill_b(layer: LoraLayer, generator: torch.Generator) -> None:
    """Give B the standard deviation that adds STRENGTH to the output."""
    lora_b = layer.lora_B["default"].weight
    lora_a = layer.lora_A["default"].weight.detach()
    hidden = lora_a.norm(dim=1).square().mean().sqrt()  # of x @ A.T, for x of unit variance
    std = STRENGTH / (layer.scaling["default"] * float(hidden) * math.sqrt(lora_b.shape[1]))
    torch.nn.init.normal_(lora_b, std=std, generator=generator)
