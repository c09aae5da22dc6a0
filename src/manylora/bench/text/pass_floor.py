"""From the passes of a run to the floor of each kind of work in each kind of step, and the share that is reached.

A step that decodes has one row of each of its sequences; any other counts as prefill, though some of its rows may
decode. Floors as in floor.py, pass by pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.bench.ceilings import Ceilings
from manylora.bench.floor import DecoderCosts
from manylora.bench.text.pass_clock import Pass


@dataclass(frozen=True, kw_only=True)
class PartShare:
    """One kind of work in all steps of a kind."""

    spent_s: float
    floor_s: float
    """The larger of bytes and operations, of each pass."""

    byte_floor_s: float
    """What the bytes alone take; base products count by their operations, which were measured reading the weights."""

    reached: float
    """floor_s over spent_s; 0 where there was no such work."""


@dataclass(frozen=True, kw_only=True)
class StepShare:
    """All steps of a kind."""

    num_steps: int
    spent_s: float
    base: PartShare
    lora: PartShare
    attention: PartShare
    other_s: float
    """Norms, activations, sampling, scheduling, and everything of Python's."""


def step_shares(passes: Sequence[Pass], costs: DecoderCosts, ceilings: Ceilings) -> dict[str, StepShare]:
    """Return "prefill" and "decode", those that there are."""
    kinds: Mapping[str, list[Pass]] = {
        "prefill": [one for one in passes if not one.is_decode],
        "decode": [one for one in passes if one.is_decode],
    }
    return {kind: _share(some, costs, ceilings) for kind, some in kinds.items() if some}


def _share(passes: Sequence[Pass], costs: DecoderCosts, ceilings: Ceilings) -> StepShare:
    byte_s, best_flop_s = 1e9 * ceilings.memory_read_gb_s, 1e9 * max(ceilings.gemm_gflop_s.values())

    def flop_s(rows: int) -> float:
        return 1e9 * ceilings.gemm_at(rows)

    base = [
        (
            one.base_s,
            0.0,
            one.num_rows * costs.flops_per_row / flop_s(one.num_rows)
            + one.num_logits * costs.flops_per_logits / flop_s(one.num_logits),
        )
        for one in passes
    ]
    lora = [(one.lora_s, one.lora_bytes / byte_s, one.lora_flops / best_flop_s) for one in passes]
    attention = [
        (
            one.attention_s,
            one.kv_tokens * costs.kv_bytes_per_token / byte_s,
            one.attended * costs.flops_per_attended / best_flop_s,
        )
        for one in passes
    ]
    spent_s = sum(one.step_s for one in passes)
    return StepShare(
        num_steps=len(passes),
        spent_s=spent_s,
        base=_part(base),
        lora=_part(lora),
        attention=_part(attention),
        other_s=spent_s - sum(one.base_s + one.lora_s + one.attention_s for one in passes),
    )


def _part(passes: Sequence[tuple[float, float, float]]) -> PartShare:
    """passes: seconds spent, that the bytes take, that the operations take."""
    spent_s = sum(spent for spent, _, _ in passes)
    floor_s = sum(max(byte_s, flop_s) for _, byte_s, flop_s in passes)
    return PartShare(
        spent_s=spent_s,
        floor_s=floor_s,
        byte_floor_s=sum(byte_s for _, byte_s, _ in passes),
        reached=floor_s / spent_s if spent_s else 0.0,
    )
