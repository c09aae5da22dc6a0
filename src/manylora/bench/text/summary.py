"""From the runs of all contenders to the row that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch

from manylora.bench.ceilings import Ceilings
from manylora.bench.floor import DecoderCosts, adapter_bytes, floor_of
from manylora.bench.machine import ForeignLoad, describe_machine, describe_revision
from manylora.bench.peers.table import ABLATIONS, PEERS, peer_without
from manylora.bench.text.config import BenchConfig
from manylora.bench.text.pass_clock import Pass
from manylora.bench.text.pass_floor import step_shares
from manylora.bench.text.result import BenchResult, Figures, Floors, PeerResult
from manylora.bench.text.worker import Turn
from manylora.bench.text.workload import Trace
from manylora.models.config import LlamaConfig


def summarise(
    config: BenchConfig,
    model: LlamaConfig,
    trace: Trace,
    ceilings: Ceilings,
    turns: Mapping[str, Turn],
    passes: Sequence[Pass],
    *,
    started: str,
    load: ForeignLoad,
    forced: bool,
) -> BenchResult:
    """Make the result of contenders that have run.

    Args:
        turns: "manylora", "base", each peer and each ablation.
        passes: of the trace with adapters, in a run of its own.
    """
    ours, base = turns["manylora"].runs, turns["base"].runs
    revision = describe_revision()
    figures, base_figures = Figures.of(ours), Figures.of(base)
    return BenchResult(
        tokens_per_s=figures.tokens_per_s,
        requests_per_s=figures.requests_per_s,
        ttft_p50_s=figures.ttft_p50_s,
        ttft_p99_s=figures.ttft_p99_s,
        tpot_p50_s=figures.tpot_p50_s,
        tokens_per_s_range=figures.tokens_per_s_range,
        base_tokens_per_s=base_figures.tokens_per_s,
        base_tokens_per_s_range=base_figures.tokens_per_s_range,
        toll=1.0 - figures.tokens_per_s / base_figures.tokens_per_s,
        distinct_adapters_per_step=ours[0].distinct_adapters_per_step,
        pool_kv_bytes=max(run.pool_kv_bytes for run in ours),
        pool_adapter_bytes=max(run.pool_adapter_bytes for run in ours),
        adapter_loads=ours[0].adapter_loads,
        adapter_evictions=ours[0].adapter_evictions,
        peak_rss_bytes=max(figures.peak_rss_bytes, base_figures.peak_rss_bytes),
        dtype=config.dtype,
        threads=config.num_threads,
        commit=revision.commit,
        dirty=revision.dirty,
        started=started,
        peers={
            name: _beside(
                turns[name], turns["manylora" if PEERS[name].runs_adapters else "base"], PEERS[name].note
            )
            for name in config.peers
        },
        without={
            name: _beside(turns[peer_without(name)], turns["manylora"], ABLATIONS[name].note)
            for name in config.ablations
        },
        ceilings=ceilings,
        floors=_floors(config, model, trace, ceilings, figures, base_figures),
        steps=step_shares(passes, _costs(config, model), ceilings),
        # The name, not the path: a row says nothing of where things lie on somebody's machine.
        config=replace(config, model=model.name),
        machine=describe_machine(),
        load=load,
        forced=forced,
    )


def _beside(turn: Turn, our_turn: Turn, note: str) -> PeerResult:
    """What came of a turn, compared with what came of ours."""
    ours, figures = our_turn.runs, Figures.of(turn.runs)
    answers = turn.runs[0].outputs
    same = [answer == our for answer, our in zip(answers, ours[0].outputs, strict=False)]
    return PeerResult(
        **asdict(figures),
        batch=turn.order.batch,
        requests=len(answers),
        speedup=Figures.of(ours).tokens_per_s / figures.tokens_per_s,
        equal_outputs=sum(same) / len(same),
        note=note,
    )


def _floors(
    config: BenchConfig,
    model: LlamaConfig,
    trace: Trace,
    ceilings: Ceilings,
    figures: Figures,
    base_figures: Figures,
) -> Floors:
    costs = _costs(config, model)
    sizes = {
        adapter: adapter_bytes(model, config.rank_of(adapter), config.row_dtype)
        for adapter in trace.adapters
    }
    floor = floor_of(trace, costs, sizes, ceilings, config.max_batch)
    base = floor_of(trace.on_base(), costs, {}, ceilings, config.max_batch)
    return Floors(
        tokens_per_s=floor.tokens_per_s,
        base_tokens_per_s=base.tokens_per_s,
        reached=figures.tokens_per_s / floor.tokens_per_s,
        base_reached=base_figures.tokens_per_s / base.tokens_per_s,
        base_products_s=floor.base_products_s,
        lora_s=floor.lora_s,
        attention_s=floor.attention_s,
    )


def _costs(config: BenchConfig, model: LlamaConfig) -> DecoderCosts:
    return DecoderCosts(model, getattr(torch, config.kv_dtype).itemsize)
