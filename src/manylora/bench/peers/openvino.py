"""OpenVINO GenAI as a contender. Runs in its own environment (benchmarks/peers/openvino.sh)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from manylora.bench.peers.environment import environment_folder
from manylora.bench.peers.loop import NumberedRequest, answer_all, by_mixture
from manylora.bench.text.batch_search import BATCHES
from manylora.bench.text.contender import Job, RunOrder
from manylora.bench.text.timeline import RunFigures, Timeline
from manylora.bench.text.workload import Trace, TraceRequest

MAX_BATCH_TOKENS = 512

KV_GB = 4
"""More than 128 sequences of the benchmark take; what is not used is never touched."""


class OpenVinoPeer:
    """`ContinuousBatchingPipeline`. Without adapters it is stepped by us, all requests together.

    Adapters belong to a call of `generate`: of the configs that it is given, one for each request, only the first's
    adapters are used, for all. So requests that name the same are a call, and those that name others the next.
    """

    def __init__(self, job: Job) -> None:
        import openvino_genai

        self.job, self.genai = job, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = max(BATCHES)
        scheduler.max_num_batched_tokens = MAX_BATCH_TOKENS
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = KV_GB
        self.adapters = {number: self._adapter(number) for number in job.trace.adapters}
        self.pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            exported(Path(job.model)), scheduler, "CPU", self._properties()
        )
        self._handles: dict[int, Any] = {}
        self._num_added = 0
        self.run(RunOrder(batch=2, max_requests=2, max_output_tokens=2))

    def _properties(self) -> dict[str, Any]:
        # Left alone, it computes in bfloat16 where the processor can, and keeps KV in eight bits.
        precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        properties = {**precision, "INFERENCE_NUM_THREADS": self.job.threads}
        if not self.adapters:
            return properties
        known = self.genai.AdapterConfig([adapter for adapter, _ in self.adapters.values()])
        return {**properties, "adapters": known}

    def _adapter(self, number: int) -> tuple[Any, float]:
        """The adapter, and what its delta is to be multiplied by: a file of PEFT's tells it alone, in its config."""
        folder = self.job.adapter_folder(number)
        config = json.loads((folder / "adapter_config.json").read_text())
        adapter = self.genai.Adapter(str(folder / "adapter_model.safetensors"))
        return adapter, config["lora_alpha"] / config["r"]

    def run(self, order: RunOrder) -> RunFigures:
        trace = order.cut(self.job.trace)
        outputs: list[list[int]] = [[] for _ in trace.requests]
        timeline = Timeline(len(trace.requests))
        if self.adapters:
            for group in by_mixture(trace.requests):
                for begin in range(0, len(group), order.batch):
                    self._call(group[begin : begin + order.batch], trace, timeline, outputs)
        else:
            answer_all(
                self,
                list(enumerate(trace.requests)),
                batch=order.batch,
                output_tokens=trace.output_tokens,
                timeline=timeline,
                outputs=outputs,
            )
        return timeline.figures(outputs)

    def _call(
        self,
        requests: Sequence[NumberedRequest],
        trace: Trace,
        timeline: Timeline,
        outputs: list[list[int]],
    ) -> None:
        """Requests of one mixture, in one call. When their tokens came, only its own figures tell."""
        config = self._config(trace.output_tokens)
        config.adapters = self._mixture(requests[0][1])
        prompts = [self._prompt(request) for _, request in requests]
        began_s = timeline.now_s
        results = self.pipeline.generate(prompts, [config] * len(prompts))
        for (number, _), result in zip(requests, results, strict=True):
            (tokens,) = result.m_generation_ids
            outputs[number] = list(tokens)
            first_s = began_s + result.perf_metrics.get_ttft().mean / 1000
            timeline.note(number, at_s=first_s)
            if len(tokens) > 1:
                timeline.note(number, len(tokens) - 1)

    def _mixture(self, request: TraceRequest) -> Any:
        chosen = self.genai.AdapterConfig()
        for number, weight in request.mixture:
            adapter, scaling = self.adapters[number]
            chosen.add(adapter, weight * scaling)
        return chosen

    def _config(self, output_tokens: int) -> Any:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output_tokens, True, False
        return config

    def _prompt(self, request: TraceRequest) -> Any:
        import openvino

        return openvino.Tensor(np.array([request.prompt], dtype=np.int64))

    def add(self, number: int, request: TraceRequest, output_tokens: int) -> None:
        self._num_added += 1
        prompt, config = self._prompt(request), self._config(output_tokens)
        self._handles[number] = self.pipeline.add_request(self._num_added, prompt, config)

    def step(self) -> Iterator[tuple[int, list[int]]]:
        self.pipeline.step()
        for number, handle in list(self._handles.items()):
            if not handle.can_read():
                continue
            (output,) = handle.read().values()
            yield number, list(output.generated_ids)
            if handle.get_status() != self.genai.GenerationStatus.RUNNING and not handle.can_read():
                del self._handles[number]


def exported(model: Path) -> Path:
    """The transformers folder `model` as OpenVINO reads it, in float32; made by optimum-intel the first time."""
    digest = blake2b((model / "config.json").read_bytes(), digest_size=8)
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    target = environment_folder("models") / f"openvino-{digest.hexdigest()}"
    if not target.exists():
        from optimum.exporters.openvino import main_export
        from optimum.intel.openvino import OVConfig

        aside = target.with_name(f".{os.getpid()}-{target.name}")
        main_export(
            str(model),
            aside,
            task="text-generation-with-past",
            library_name="transformers",
            ov_config=OVConfig(dtype="fp32"),
            convert_tokenizer=True,
            local_files_only=True,
        )
        os.rename(aside, target)
    return target
