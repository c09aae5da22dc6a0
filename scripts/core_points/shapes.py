"""Figures that need no traffic: the pool's waste, the library's index, the decoder's logits."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from manylora.lora.library import Library
from manylora.memory.page_size import MAX_WASTE, choose_page_tokens, worst_adapter_waste
from manylora.memory.waste import MODELS
from manylora.models.demo_model import DEMO_MODEL, require_demo_model
from manylora.models.loading import load_model
from manylora.models.tiny import save_tiny, tiny_config
from manylora.models.tokenizer import load_tokenizer
from points import Line
from tests.models.oracle import our_logits, their_logits, transformers_model


def lines() -> Iterator[Line]:
    for shape in MODELS:
        page_tokens = choose_page_tokens(shape)
        waste = worst_adapter_waste(shape, page_tokens)
        yield Line(
            f"pool waste, {shape.name}, all linears, rank >= 16",
            f"{waste:.1%} at most, pages of {page_tokens} tokens",
            f"<= {MAX_WASTE:.0%}",
            waste <= MAX_WASTE,
        )
    yield _index()
    tokens = torch.randint(0, 257, (40,), generator=torch.Generator().manual_seed(0))
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        with tempfile.TemporaryDirectory() as folder:
            source = save_tiny(Path(folder) / family, tiny_config(family))
            yield _logits(
                family,
                our_logits(load_model(source), tokens),
                their_logits(transformers_model(source), tokens),
            )
    path = require_demo_model()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    real = torch.tensor(
        load_tokenizer(DEMO_MODEL).encode("The sea is wide and the ship is small, said the captain.")
    )
    yield _logits(
        "SmolLM2-135M-Instruct", our_logits(load_model(DEMO_MODEL), real), their_logits(theirs, real)
    )


def _logits(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Line:
    error = float((ours - theirs).abs().max())
    return Line(
        f"logits equal transformers', {name}", f"max abs error {error:.1e}", "<= 1e-4", error <= 1e-4
    )


def _index() -> Line:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(10_000):
            adapter = Path(folder) / f"adapter-{number}"
            adapter.mkdir()
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                os.close(os.open(adapter / file, os.O_CREAT))  # empty: reading one would fail
        began = time.perf_counter()
        count = len(Library(folder).names())
        seconds = time.perf_counter() - began
    return Line(
        "10,000 adapters indexed, no file read",
        f"{count} in {seconds:.2f} s",
        "< 2 s",
        count == 10_000 and seconds < 2,
    )
