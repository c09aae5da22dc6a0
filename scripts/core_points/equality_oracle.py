"""The truth of the equality point: transformers and PEFT, greedily, requests of one mixture in one batch.

The base runs as it is, an adapter through PEFT, a mixture as a copy of the base to which the float64 sum of PEFT's
weighted deltas was added.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from core_points.equality_cases import Case

NUM_TOKENS = 24
END_OF_ANSWER = 2
MAX_BATCH = 32


@dataclass(frozen=True)
class Truth:
    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    """Between the two best logits at each token."""


class Oracle:
    """Holds every adapter, and decodes."""

    def __init__(self, model: Any, folder: Path, names: list[str]) -> None:
        self.peft = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            self.peft.load_adapter(folder / name, adapter_name=name)
        self.peft.eval()

    def decode(self, cases: Sequence[Case], on_done: Callable[[int], None] = lambda _: None) -> list[Truth]:
        """Decode every case, those of one mixture together; `on_done` is told how many are done each time."""
        truths: dict[int, Truth] = {}
        for same in _by_mixture(cases):
            with self._running(list(cases[same[0]].mixture.items())):
                for begin in range(0, len(same), MAX_BATCH):
                    batch = same[begin : begin + MAX_BATCH]
                    truths |= zip(batch, self._greedy([cases[i].tokens for i in batch]), strict=True)
                    on_done(len(truths))
        return [truths[i] for i in range(len(cases))]

    @contextmanager
    def _running(self, weighted: list[tuple[str, float]]) -> Iterator[None]:
        if len(weighted) == 1 and weighted[0][1] == 1.0:
            self.peft.set_adapter(weighted[0][0])
            yield
        else:
            with self._merged(weighted), self.peft.disable_adapter():
                yield

    @contextmanager
    def _merged(self, weighted: list[tuple[str, float]]) -> Iterator[None]:
        """The base with the float64 sum of the weighted deltas added to its weights, for a while."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for module in self.peft.modules() if weighted else ():
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
    def _greedy(self, prompts: Sequence[Sequence[int]]) -> list[Truth]:
        """With the KV cache; shorter prompts are padded on the left, masked, and count their own positions."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, steps = None, []
        for _ in range(NUM_TOKENS):
            out = self.peft(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            steps.append(out.logits[:, -1].topk(2))
            ids, positions = steps[-1].indices[:, :1], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        tokens = torch.stack([step.indices[:, 0] for step in steps], 1)
        gaps = torch.stack([step.values[:, 0] - step.values[:, 1] for step in steps], 1)
        return [_until_the_end(*row) for row in zip(tokens.tolist(), gaps.tolist(), strict=True)]


def _by_mixture(cases: Sequence[Case]) -> list[list[int]]:
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(tuple(sorted(case.mixture.items())), []).append(number)
    return list(groups.values())


def _until_the_end(tokens: list[int], gaps: list[float]) -> Truth:
    """A row goes on in its batch when its answer has ended; what comes after is nobody's."""
    end = tokens.index(END_OF_ANSWER) + 1 if END_OF_ANSWER in tokens else len(tokens)
    return Truth(tuple(tokens[:end]), tuple(gaps[:end]))
