"""What eight-bit base products cost and bring: python scripts/int8_price.py [MODEL]

Perplexity of the licence and the documents under the model in float32, in int8, and in int8 with one kind of product in
float32; then seconds of all layers' products and of the output head, both ways, in turns.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from manylora.models.demo_model import DEMO_MODEL
from manylora.models.dense_attention import DenseAttention
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.models.sites import Stack
from manylora.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = (ROOT / "LICENSE", *sorted((ROOT / "docs").glob("*.md")))
MOST_TOKENS = 14_000
"""In all. The perplexities of two roundings of as short a text as the licence differ by 0.3 % by chance."""

CHUNK_TOKENS = 512
ROWS = (1, 16, 32, 128, 512)
ROUNDS = 7


def logits_of(model: Llama, tokens: list[int]) -> Tensor:  # [T, vocab]
    attention = DenseAttention([len(tokens)], scale=model.config.attention_scale)
    return model(torch.tensor(tokens), attention.positions, attention)


def judge(model: Llama, chunks: list[list[int]]) -> tuple[float, Tensor]:
    """Perplexity over all chunks, and the greedy token at each place."""
    surprise, greedy = 0.0, []
    for tokens in chunks:
        logits = logits_of(model, tokens)
        surprise -= float(logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).sum())
        greedy.append(logits.argmax(-1))
    return math.exp(surprise / sum(len(tokens) - 1 for tokens in chunks)), torch.cat(greedy)


def with_float(name: str, exact: Llama, kept: Stack | None) -> Llama:
    """The rounded model with one stack of every layer, or the output head (None), taken from the exact one."""
    model = load_model(name, dtype="int8")
    if kept is None:
        model.output = exact.output
        return model
    for number, layer in enumerate(model.layers):
        setattr(layer, kept.name.lower(), exact.base_product(number, kept))
    return model


def products(model: Llama, rows: int) -> Callable[[], None]:
    inputs = {stack: torch.randn(rows, model.base_product(0, stack).in_features) for stack in Stack}
    hidden = torch.randn(rows, model.config.hidden_size)

    @torch.inference_mode()
    def run() -> None:
        for layer in range(model.config.num_layers):
            for stack in Stack:
                model.base_product(layer, stack)(inputs[stack])
        model.output(hidden)

    return run


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL
    text = "".join(path.read_text(encoding="utf-8") for path in TEXTS)
    tokens = load_tokenizer(name).encode(text)[:MOST_TOKENS]
    chunks = [tokens[i : i + CHUNK_TOKENS] for i in range(0, len(tokens) - 1, CHUNK_TOKENS)]
    exact, rounded = load_model(name), load_model(name, dtype="int8")
    with torch.inference_mode():
        base, greedy = judge(exact, chunks)
        print(f"{len(tokens)} tokens of {len(TEXTS)} texts; float32: perplexity {base:.3f}")
        perplexity, other = judge(rounded, chunks)
        same = (greedy == other).double().mean()
        print(
            f"int8: perplexity {perplexity:.3f} ({perplexity / base - 1:+.1%}), greedy tokens equal {same:.1%}"
        )
        for kept in (*Stack, None):
            partly, _ = judge(with_float(name, exact, kept), chunks)
            label = "the output head" if kept is None else kept.name.lower()
            print(f"  with {label} in float32: {partly / base - 1:+.1%}")
    print(f"all products of a pass, {torch.get_num_threads()} threads, fastest of {ROUNDS} in turns:")
    for rows in ROWS:
        works = [products(model, rows) for model in (exact, rounded)]
        times = [[seconds(work) for work in works] for _ in range(ROUNDS)]
        floats, integers = (min(column) for column in zip(*times, strict=True))
        print(
            f"  {rows:4d} rows: float32 {floats * 1e3:7.1f} ms, int8 {integers * 1e3:7.1f} ms, {floats / integers:.2f}x"
        )


if __name__ == "__main__":
    main()
