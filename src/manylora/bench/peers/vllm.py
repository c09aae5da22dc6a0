"""vLLM on a CPU as a contender. Runs in its own environment (benchmarks/peers/vllm_cpu.sh)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from manylora.bench.peers.loop import answer_all
from manylora.bench.text.batch_search import BATCHES
from manylora.bench.text.contender import Job, RunOrder
from manylora.bench.text.timeline import RunFigures, Timeline
from manylora.bench.text.workload import TraceRequest

MAX_BATCH_TOKENS = 512

KV_BLOCK_TOKENS = 128
"""Of vLLM's blocks on a CPU: every sequence ends with one that is part full."""


class VllmPeer:
    """`LLMEngine`, stepped by us. Its model runs in a process of vLLM's own, whose threads it binds to cores."""

    def __init__(self, job: Job) -> None:
        from vllm import EngineArgs, LLMEngine, SamplingParams
        from vllm.lora.request import LoRARequest

        self.job = job
        self._params = SamplingParams
        self._max_num_seqs = min(len(job.trace.requests), max(BATCHES))
        self._longest = max(len(request.prompt) for request in job.trace.requests) + job.trace.output_tokens
        self.engine: Any = LLMEngine.from_engine_args(EngineArgs(**self._arguments()))
        self._loras: dict[int, Any] = {
            number: LoRARequest(f"adapter-{number}", number + 1, str(job.adapter_folder(number)))
            for number in job.trace.adapters
        }
        for lora in self._loras.values():
            self.engine.add_lora(lora)
        self._num_runs = 0
        self._given: dict[str, int] = {}  # tokens that each open request has been given
        self.run(RunOrder(batch=2, max_requests=2, max_output_tokens=2))

    def _arguments(self) -> dict[str, Any]:
        """What its documentation advises for throughput on a CPU; 512 tokens a batch are its fastest with adapters."""
        return {
            "model": self.job.model,
            "dtype": self.job.dtype,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": self._longest,
            "max_num_seqs": self._max_num_seqs,
            "max_num_batched_tokens": MAX_BATCH_TOKENS,
            "kv_cache_memory_bytes": self._kv_bytes(),
            "disable_log_stats": True,
            **(self._lora_arguments() if self.job.trace.adapters else {}),
        }

    def _lora_arguments(self) -> dict[str, Any]:
        """Every adapter of the trace in a slot of its own, so that none is ever loaded within the time."""
        from vllm.config.lora import MaxLoRARanks

        adapters = self.job.trace.adapters
        configs = [self.job.adapter_folder(number) / "adapter_config.json" for number in adapters]
        rank = max(json.loads(file.read_text())["r"] for file in configs)
        return {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_cpu_loras": len(adapters),
            "max_lora_rank": min(known for known in get_args(MaxLoRARanks) if known >= rank),
        }

    def _kv_bytes(self) -> int:
        """Room for all sequences at their longest."""
        config = json.loads(Path(self.job.model, "config.json").read_text())
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        itemsize = 4 if self.job.dtype == "float32" else 2
        token_bytes = 2 * config["num_hidden_layers"] * heads * head_dim * itemsize
        blocks = self._longest // KV_BLOCK_TOKENS + 2
        return int(self._max_num_seqs * blocks * KV_BLOCK_TOKENS * token_bytes)

    def run(self, order: RunOrder) -> RunFigures:
        trace = order.cut(self.job.trace)
        self._num_runs += 1
        outputs: list[list[int]] = [[] for _ in trace.requests]
        timeline = Timeline(len(trace.requests))
        answer_all(
            self,
            list(enumerate(trace.requests)),
            batch=order.batch,
            output_tokens=trace.output_tokens,
            timeline=timeline,
            outputs=outputs,
        )
        return replace(timeline.figures(outputs), peak_rss_bytes=_peak_rss_of_all())

    def add(self, number: int, request: TraceRequest, output_tokens: int) -> None:
        request_id = f"{self._num_runs}-{number}"
        self._given[request_id] = 0
        self.engine.add_request(
            request_id,
            {"prompt_token_ids": list(request.prompt)},
            self._params(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False),
            lora_request=self._loras[request.mixture[0][0]] if request.mixture else None,
        )

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """vLLM hands out all of an answer so far; what is new is what we have not seen."""
        for output in self.engine.step():
            tokens = list(output.outputs[0].token_ids)
            given, self._given[output.request_id] = self._given[output.request_id], len(tokens)
            yield int(output.request_id.partition("-")[2]), tokens[given:]


def _peak_rss_of_all() -> int:
    """Of this process and those that vLLM has started; what they share counts for each."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    lines = [Path(f"/proc/{process.pid}/status").read_text().splitlines() for process in processes]
    return sum(
        int(line.split()[1]) * 1024 for status in lines for line in status if line.startswith("VmHWM:")
    )
