"""Fit what a decode step costs to kept records of `manylora bench steps`, see whether it holds, and project.

python scripts/step_cost.py     writes docs/scaling.md between its marks

The records: benchmarks/figures/step_cost.sh --record. Every other point of the models in the fit is held out, and the
whole of one model.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from manylora.bench.steps.config import Point
from manylora.bench.steps.cost import StepCost, StepWork, model_of
from manylora.models.config import LlamaConfig
from speed_points import kernels
from speed_points.text_records import RECORDS, said
from tested import ROOT

COMMAND = "benchmarks/figures/step_cost.sh --record"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- begin: scripts/step_cost.py -->", "<!-- end: scripts/step_cost.py -->"
HELD_OUT = "random-360m"
DTYPE = "float32"


@dataclass(frozen=True)
class Measured:
    model: LlamaConfig
    point: Point
    step_s: float
    is_fitted: bool

    @property
    def work(self) -> StepWork:
        return StepWork.of(self.model, self.point, DTYPE)


@dataclass(frozen=True)
class Fit:
    """The costs, and how far they are off where they were not fitted."""

    cost: StepCost
    measured: tuple[Measured, ...]
    records: tuple[dict[str, Any], ...]

    def errors(self, model: str | None = None) -> list[float]:
        """Predicted over measured, less one, of what was held out; of one model or all."""
        return [
            self.cost.seconds(one.work) / one.step_s - 1
            for one in self.measured
            if not one.is_fitted and model in (None, one.model.name)
        ]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(one.model.name for one in self.measured))


def fit(records: Path = RECORDS) -> Fit | None:
    """None: not all three models were measured."""
    newest: dict[str, dict[str, Any]] = {}
    for file in records.glob(f"*_steps-{DTYPE}-*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        name = record["sizes"]["name"]
        if name not in newest or newest[name]["started"] < record["started"]:
            newest[name] = record
    if len(newest) < 3 or HELD_OUT not in newest:
        return None
    measured = tuple(one for record in newest.values() for one in _points(record))
    fitted = [one for one in measured if one.is_fitted]
    cost = StepCost.fit([one.work for one in fitted], [one.step_s for one in fitted])
    return Fit(cost, measured, tuple(newest.values()))


def _points(record: dict[str, Any]) -> Iterator[Measured]:
    model, config = model_of(record["sizes"]), record["config"]
    at = {name: config[f"at_{name}"] for name in ("batch", "context", "rank")}
    points = {
        Point(**{**at, name: point["value"]}): point["step_s"]
        for name, table in record["tables"].items()
        for point in table["points"]
    }
    for number, (point, step_s) in enumerate(sorted(points.items())):
        yield Measured(model, point, step_s, model.name != HELD_OUT and number % 2 == 0)


# ---- projection


@dataclass(frozen=True)
class Hardware:
    """What its makers say it can do, and what a layer costs whatever it computes."""

    name: str
    memory_gb_s: float
    products_tflop_s: float
    memory_gb: float
    layer_us: float
    """None of the measured: 10 us where a graph of calls is launched at once, 30 us a barrier of a hundred threads."""


MACHINES = (
    Hardware("2 x Xeon Platinum 8490H", 614, 2 * 60 * 2048 * 1.9e9 / 1e12, 1024, 30),
    Hardware("1 x H100 SXM", 3350, 989, 80, 10),
    Hardware("8 x H100 SXM, tensor parallel", 8 * 3350, 8 * 989, 640, 30),
)

MODELS = {
    "Llama-3-8B": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
    },
    "Llama-3-70B": {
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "head_dim": 128,
    },
}

BATCH, CONTEXT, RANK = 128, 1024, 16


@dataclass(frozen=True)
class Shares:
    """Of this machine's measured ceilings, what the fitted costs reach: taken to hold elsewhere."""

    weights: float
    kv: float
    rank_rows: float
    products: float


def shares(cost: StepCost, ceilings: dict[str, Any]) -> Shares:
    byte_s = 1 / (ceilings["memory_read_gb_s"] * 1e9)
    flop_s = 1 / (max(ceilings["gemm_gflop_s"].values()) * 1e9)

    def share(best: float, paid: float) -> float:
        return min(1.0, best / paid) if paid else 1.0

    return Shares(
        weights=share(byte_s, cost.weights),
        kv=share(byte_s, cost.kv),
        rank_rows=share(byte_s, cost.rank_rows),
        products=share(flop_s, cost.products),
    )


def project(machine: Hardware, model: LlamaConfig, reached: Shares, distinct: int) -> tuple[float, float]:
    """(seconds of a step, seconds of them that its adapters take)."""
    work = StepWork.of(model, Point(BATCH, CONTEXT, RANK), "bfloat16", distinct=distinct)
    byte_s = 1 / (machine.memory_gb_s * 1e9)
    rank_rows_s = work.rank_rows * byte_s / reached.rank_rows
    base_s = (
        work.layers * machine.layer_us * 1e-6
        + (work.weights / reached.weights + work.kv / reached.kv) * byte_s
        + work.products / (machine.products_tflop_s * 1e12) / reached.products
    )
    return base_s + rank_rows_s, rank_rows_s


def fits(machine: Hardware, model: LlamaConfig) -> int:
    """Adapters that lie beside the weights and the KV of a full batch; 0: not even those fit."""
    work = StepWork.of(model, Point(BATCH, CONTEXT, RANK), "bfloat16", distinct=1)
    room = machine.memory_gb * 1e9 * 0.9 - work.weights - work.kv
    return max(0, int(room / work.rank_rows))


def page(found: Fit, ceilings: dict[str, Any]) -> Iterator[str]:
    """The lines between the marks."""
    cost, reached = found.cost, shares(found.cost, ceilings)
    yield from ("", "| what | fitted cost | of this machine's ceiling |", "|---|---|---|")
    for label, seconds, unit, share in (
        ("a layer", cost.layers, "us", None),
        ("weights", cost.weights, "GB/s", reached.weights),
        ("products", cost.products, "GFLOP/s", reached.products),
        ("rank rows", cost.rank_rows, "GB/s", reached.rank_rows),
        ("KV", cost.kv, "GB/s", reached.kv),
        ("a page or run", cost.pages, "us", None),
        ("a sequence", cost.sequences, "us", None),
    ):
        if not seconds:
            figure = "nothing"
        else:
            figure = f"{1e6 * seconds:.3g} us" if unit == "us" else f"{1e-9 / seconds:.3g} {unit}"
        yield f"| {label} | {figure} | {'' if share is None else f'{share:.0%}'} |"
    yield from (
        "",
        "| steps that were held out | points | error, median | error, largest |",
        "|---|---|---|---|",
    )
    for name in found.models:
        errors = [abs(error) for error in found.errors(name)]
        yield f"| {name} | {len(errors)} | {median(errors):.1%} | {max(errors):.1%} |"
    yield from (
        "",
        f"A decode step of {BATCH} sequences at {CONTEXT} tokens of context, adapters of rank {RANK} on all linears, "
        "bfloat16; milliseconds, and output tokens a second:",
        "",
        "| model | machine | base alone | 1 adapter | 16 | 128 | toll of 128 | adapters that fit beside |",
        "|---|---|---|---|---|---|---|---|",
    )
    for name, sizes in MODELS.items():
        model = model_of({"name": name, **sizes})
        for machine in MACHINES:
            room = fits(machine, model)
            if not room:
                yield f"| {name} | {machine.name} | does not fit | | | | | |"
                continue
            steps = [project(machine, model, reached, distinct) for distinct in (0, 1, 16, 128)]
            cells = [f"{1e3 * step:.3g} ms, {BATCH / step:.0f}/s" for step, _ in steps]
            yield f"| {name} | {machine.name} | {' | '.join(cells)} | {steps[-1][0] / steps[0][0] - 1:.0%} | {room:,} |"
    yield from ("", *(f"Steps: {said(record)}, `{record['command']}`." for record in found.records), "")


def main(records: Path = RECORDS, path: Path = PAGE) -> None:
    found, ceilings = fit(records), kernels.newest(records)
    if found is None or ceilings is None:
        sys.exit(f"records are missing; make them by: {COMMAND}; {kernels.COMMAND}")
    lines: Sequence[str] = [BEGIN, *page(found, ceilings["ceilings"]), END]
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{path} lacks the marks {BEGIN} and {END}")
    path.write_text(text.partition(BEGIN)[0] + "\n".join(lines) + text.partition(END)[2], encoding="utf-8")
    print("\n".join(lines[1:-1]))


if __name__ == "__main__":
    main()
