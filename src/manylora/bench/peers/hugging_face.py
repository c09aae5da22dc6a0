"""The systems that manylora is measured beside: transformers, and PEFT in its two ways of serving several adapters.

All run `generate` over static batches, greedily, with scaled dot product attention. Nothing ends an answer early, so
that everybody makes the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora.bench.adapters import adapter_name
from manylora.bench.peers.peft_loading import load_peft_model
from manylora.bench.text.contender import Job, RunOrder
from manylora.bench.text.timeline import RunFigures, Timeline
from manylora.bench.text.workload import TraceRequest
from manylora.models.locate import locate

Mixture = tuple[tuple[int, float], ...]
Batch = list[tuple[int, TraceRequest]]
"""Requests with their place in the trace."""


class TransformersPeer:
    """The base model alone; what a request names is left out of account."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.trace = job.trace
        self.model: Any = load_causal_lm(job.model, job.dtype)
        self.prepare(job)
        self.run(RunOrder(batch=2, max_requests=2, max_output_tokens=2))

    def prepare(self, job: Job) -> None:
        """Whatever is to be done once and is not timed."""

    def batches(self, order: RunOrder) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Cut the trace into batches, each with what `generate` is told besides."""
        requests = list(enumerate(order.cut(self.trace).requests))
        for begin in range(0, len(requests), order.batch):
            yield requests[begin : begin + order.batch], {}

    def run(self, order: RunOrder) -> RunFigures:
        trace = order.cut(self.trace)
        outputs: list[list[int]] = [[] for _ in trace.requests]
        timeline = Timeline(len(trace.requests))
        for batch, options in self.batches(order):
            prompts, mask = pad_left([request.prompt for _, request in batch])
            tokens = self.model.generate(
                input_ids=prompts,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=trace.output_tokens,
                stopping_criteria=_token_clock(timeline, [number for number, _ in batch]),
                **options,
            )
            for (number, _), answer in zip(batch, tokens[:, prompts.shape[1] :].tolist(), strict=True):
                outputs[number] = answer
        return timeline.figures(outputs)


class PeftPeer(TransformersPeer):
    """PEFT's mixed batch: every adapter loaded, each row of a batch told its own by `adapter_names`.

    PEFT takes one adapter a row, so a mixture of several is first turned into one (`add_weighted_adapter`, "cat").
    """

    def prepare(self, job: Job) -> None:
        loaded = [adapter_name(number) for number in job.trace.adapters]
        self.model = load_peft_model(self.model, Path(job.adapters_folder), loaded)
        for mixture in {request.mixture for request in job.trace.requests if len(request.mixture) > 1}:
            names, weights = zip(*mixture, strict=True)
            self.model.add_weighted_adapter(
                adapters=[adapter_name(number) for number in names],
                weights=list(weights),
                adapter_name=peft_name(mixture),
                combination_type="cat",
            )
        self.model.eval()

    def batches(self, order: RunOrder) -> Iterator[tuple[Batch, dict[str, Any]]]:
        for batch, _ in super().batches(order):
            yield batch, {"adapter_names": [peft_name(request.mixture) for _, request in batch]}


class PeftSwitchPeer(PeftPeer):
    """PEFT with one active adapter: `set_adapter`, then the requests that name it, then the next."""

    def batches(self, order: RunOrder) -> Iterator[tuple[Batch, dict[str, Any]]]:
        requests = sorted(enumerate(order.cut(self.trace).requests), key=lambda item: item[1].mixture)
        for mixture, group in groupby(requests, key=lambda item: item[1].mixture):
            same = list(group)
            self.model.set_adapter(peft_name(mixture))
            for begin in range(0, len(same), order.batch):
                yield same[begin : begin + order.batch], {}


def peft_name(mixture: Mixture) -> str:
    """What PEFT knows a mixture by."""
    if len(mixture) == 1:
        return adapter_name(mixture[0][0])
    # A module's name: no points.
    return "mixture-" + "-".join(f"{number}x{round(weight * 1000)}" for number, weight in mixture)


def load_causal_lm(model: str, dtype: str) -> Any:
    """The model in transformers (which reads GGUF by its own code); it never stops at an end-of-sequence token."""
    from transformers import AutoModelForCausalLM

    files = locate(model)
    loaded = AutoModelForCausalLM.from_pretrained(
        files.directory,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        **({"gguf_file": files.gguf.name} if files.gguf else {}),
    )
    loaded.generation_config.eos_token_id = None
    # Rows of equal length need no padding; the id only silences the question.
    loaded.generation_config.pad_token_id = 0
    return loaded.eval()


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [N, longest] and their mask; shorter prompts begin later."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask


def _token_clock(timeline: Timeline, numbers: Sequence[int]) -> Any:
    """A stopping criterion that never stops: `generate` asks it after each token, so it is our clock."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            for number in numbers:
                timeline.note(number)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    return StoppingCriteriaList([Clock()])
