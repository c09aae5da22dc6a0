"""llama.cpp as a contender, through the library that benchmarks/peers/llama_cpp.sh builds."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manylora.bench.peers.environment import environment_folder
from manylora.bench.peers.loop import answer_all, by_mixture
from manylora.bench.text.batch_search import BATCHES
from manylora.bench.text.contender import ADAPTER_GGUF, Job, RunOrder
from manylora.bench.text.timeline import RunFigures, Timeline
from manylora.bench.text.workload import TraceRequest

MAX_BATCH_TOKENS = 512


@dataclass
class _Open:
    """A request that is being answered, in one of llama.cpp's sequences."""

    number: int
    sequence: int
    pending: list[int]
    """Tokens whose KV is not there yet."""
    left: int
    """Tokens of the answer still to come."""
    num_computed: int = 0


@dataclass
class _Rows:
    """What goes into one forward pass."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    sampled: list[_Open] = field(default_factory=list)
    """Whose tokens `wanted` asks for, in order."""


class LlamaCppPeer:
    """Continuous batching as llama.cpp's server does it: decodes first, prompts in what is left of a batch.

    The adapters are the context's, for all its sequences: requests that name the same are answered together, those
    that name others after them.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.library = _library()
        self._num_sequences = min(len(job.trace.requests), max(BATCHES))
        longest = max(len(request.prompt) for request in job.trace.requests) + job.trace.output_tokens
        float32_kv = job.model.endswith("f32.gguf")
        self.decoder = self.library.open_decoder(
            job.model.encode(), self._num_sequences, longest, MAX_BATCH_TOKENS, job.threads, float32_kv
        )
        if not self.decoder:
            raise RuntimeError(f"llama.cpp could not load {job.model}")
        self.adapters = {number: self._load(number) for number in job.trace.adapters}
        self._open: list[_Open] = []
        self.run(RunOrder(batch=2, max_requests=2, max_output_tokens=2))

    def _load(self, number: int) -> int:
        file = self.job.adapter_folder(number) / ADAPTER_GGUF
        adapter: int | None = self.library.load_adapter(self.decoder, str(file).encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp could not load {file}")
        return adapter

    def run(self, order: RunOrder) -> RunFigures:
        trace = order.cut(self.job.trace)
        outputs: list[list[int]] = [[] for _ in trace.requests]
        timeline = Timeline(len(trace.requests))
        for group in by_mixture(trace.requests):
            self._use(group[0][1].mixture)
            answer_all(
                self,
                group,
                batch=min(order.batch, self._num_sequences),
                output_tokens=trace.output_tokens,
                timeline=timeline,
                outputs=outputs,
            )
        return timeline.figures(outputs)

    def _use(self, mixture: Sequence[tuple[int, float]]) -> None:
        adapters = (ctypes.c_void_p * len(mixture))(*(self.adapters[number] for number, _ in mixture))
        scales = (ctypes.c_float * len(mixture))(*(weight for _, weight in mixture))
        self._check(self.library.use_adapters(self.decoder, adapters, scales, len(mixture)), "use_adapters")

    def add(self, number: int, request: TraceRequest, output_tokens: int) -> None:
        taken = {one.sequence for one in self._open}
        sequence = next(i for i in range(self._num_sequences) if i not in taken)
        self.library.forget_sequence(self.decoder, sequence)
        self._open.append(_Open(number, sequence, list(request.prompt), output_tokens))

    def step(self) -> Iterator[tuple[int, list[int]]]:
        rows = self._rows()
        best = np.zeros(len(rows.sampled), dtype=np.int32)
        arrays = [np.array(part, dtype=np.int32) for part in (rows.tokens, rows.positions, rows.sequences)]
        wanted = np.array(rows.wanted, dtype=np.int8)
        status = self.library.decode(
            self.decoder, *map(_pointer, arrays), _pointer(wanted), len(wanted), _pointer(best)
        )
        self._check(status, "decode")
        for one, token in zip(rows.sampled, best.tolist(), strict=True):
            one.pending, one.left = [token], one.left - 1
            yield one.number, [token]
        self._open = [one for one in self._open if one.left]

    def _rows(self) -> _Rows:
        """One token of those who answer; then prompts, oldest first, as far as the batch goes."""
        rows, budget = _Rows(), MAX_BATCH_TOKENS
        for one in sorted(self._open, key=lambda one: len(one.pending) > 1):
            count = min(budget, len(one.pending))
            budget -= count
            is_whole = 0 < count == len(one.pending)
            rows.tokens += one.pending[:count]
            rows.positions += range(one.num_computed, one.num_computed + count)
            rows.sequences += [one.sequence] * count
            rows.wanted += [0] * (count - is_whole) + [1] * is_whole
            rows.sampled += [one] * is_whole
            one.pending = one.pending[count:]
            one.num_computed += count
        return rows

    def _check(self, status: int, call: str) -> None:
        if status != 0:
            raise RuntimeError(f"llama.cpp: {call} ended with status {status}")


def _library() -> Any:
    library = ctypes.CDLL(str(environment_folder("llama-cpp") / "libsequences.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    library.open_decoder.restype = library.load_adapter.restype = pointer
    library.open_decoder.argtypes = [ctypes.c_char_p, number, number, number, number, ctypes.c_bool]
    library.load_adapter.argtypes = [pointer, ctypes.c_char_p]
    library.use_adapters.argtypes = [pointer, pointer, pointer, number]
    library.forget_sequence.argtypes = [pointer, number]
    library.decode.argtypes = [pointer, *[pointer] * 4, number, pointer]
    return library


def _pointer(values: np.ndarray) -> int:
    return int(values.ctypes.data)
