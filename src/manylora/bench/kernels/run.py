"""`manylora bench kernels`: how near does each kernel come to what the machine can do, and who is slower?

Ceilings: the bytes that a kernel must read at the measured rate of the memory, its operations at the measured rate of
the decoder's own products. Baselines: the kernels in torch, and for LoRA the gathering of an adapter for every row.
All run in turns, on data that no cache holds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import chain

import torch

from manylora.bench.ceilings import Ceilings, measure_ceilings, torch_threads
from manylora.bench.floor import layer_products
from manylora.bench.kernels.attention import attention_cases
from manylora.bench.kernels.case import Case, measure, num_sets
from manylora.bench.kernels.config import KernelsConfig
from manylora.bench.kernels.lora import lora_cases
from manylora.bench.kernels.result import KernelFigures, KernelsResult
from manylora.bench.kernels.rows import product_cases, row_cases
from manylora.bench.machine import (
    LoadWatch,
    check_idle,
    check_memory,
    describe_machine,
    describe_revision,
    last_level_cache_bytes,
)
from manylora.bench.settings import command_line, told
from manylora.kernels import available_backends, native
from manylora.models.config import LlamaConfig
from manylora.models.loading import load_config

CACHES_PER_WORKING_SET = 4

MOST_COPIES = 4
"""Working sets that a case may hold at a time: the pool, what gather reads, what dense reads, and a margin."""

Report = Callable[[str], None]
"""Told in a few words what begins now."""


def run(config: KernelsConfig, report: Report = lambda _: None) -> KernelsResult:
    """Measure.

    Raises:
        ConfigError: the machine is busy, unless `force`; or it lacks the memory for such working sets.
        RuntimeError: an implementation gives other answers than ours.
    """
    model, cache_bytes = load_config(config.model), last_level_cache_bytes()
    working_set_bytes = config.working_set_bytes or CACHES_PER_WORKING_SET * cache_bytes
    check_memory(
        MOST_COPIES * working_set_bytes, f"working sets of {working_set_bytes} bytes", "--working-set-bytes"
    )
    report("looking whether the machine is idle")
    forced = check_idle(force=config.force)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    report("measuring the ceilings")
    ceilings = _ceilings(config, model, working_set_bytes)
    watch = LoadWatch()
    with torch_threads(config.num_threads), torch.inference_mode():
        rows = tuple(_measured(config, model, working_set_bytes, ceilings, report))
    load, revision, ours = watch.stop(), describe_revision(), available_backends()[0]
    return KernelsResult(
        rows=rows,
        ceilings=ceilings,
        backend=ours,
        isa=native.isa() if ours == "native" else "",
        working_set_bytes=working_set_bytes,
        last_level_cache_bytes=cache_bytes,
        threads=config.num_threads,
        config=told(config),
        command=command_line("kernels", config),
        commit=revision.commit,
        dirty=revision.dirty,
        started=started,
        machine=describe_machine(),
        load=load,
        forced=forced,
    )


def _ceilings(config: KernelsConfig, model: LlamaConfig, working_set_bytes: int) -> Ceilings:
    """Products on working sets as large as the kernels'; memory on what was asked for, else on what no cache holds."""
    products = layer_products(model)
    layer_bytes = 4 * sum(out * fan_in for out, fan_in in products)
    return measure_ceilings(
        products,
        num_sets(working_set_bytes, layer_bytes),
        torch.float32,
        threads=config.num_threads,
        read_bytes=config.working_set_bytes or None,
        min_weight_bytes=working_set_bytes,
    )


def _measured(
    config: KernelsConfig, model: LlamaConfig, working_set_bytes: int, ceilings: Ceilings, report: Report
) -> Iterator[KernelFigures]:
    for case in _cases(config, model, working_set_bytes):
        report(f"{case.kernel} {case.shape}")
        times = measure(case, repeats=config.repeats, sample_s=config.sample_s)
        figures = KernelFigures.of(case, times, ceilings)
        report(f"  {1e6 * times['ours'].median_s:.0f} us, {figures.reached:.0%} of its ceiling")
        yield figures
        # Closures of a case hold each other and its gigabytes.
        del case
        gc.collect()


def _cases(config: KernelsConfig, model: LlamaConfig, working_set_bytes: int) -> Iterator[Case]:
    lora = (
        lora_cases(config, model, working_set_bytes)
        if {"shrink", "expand", "lora"} & {*config.kernels}
        else ()
    )
    return chain(
        lora,
        attention_cases(config, model, working_set_bytes),
        row_cases(config, model, working_set_bytes),
        product_cases(config, model, working_set_bytes),
    )
