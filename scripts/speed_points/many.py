"""What more adapters, and mixtures of them, cost. Throughput is read from kept records; a wide step is run here."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from manylora.bench.adapters import adapter_name, write_adapters
from manylora.bench.engine import adapter_room, sequence_room, step
from manylora.lora.library import Library
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.models.sites import base_sites
from manylora.text import Engine, EngineConfig, SamplingParams
from points import Line, missing
from speed_points.text_records import Row, newest, said

COMMAND = "benchmarks/figures/many_adapters.sh"
MIXTURES_COMMAND = "benchmarks/figures/mixtures.sh"
POOL_BYTES = 2_200_000_000
FEW, SOME, MANY = 1, 200, 2000
MAX_DROP = 0.06
MAX_OVER_SINGLE = 1.1

MODEL = "smollm2-135m-instruct"
WIDE = 256
WIDE_TOKENS = 32
"""Enough for the last adapter to be there before the first request ends."""

WIDE_PROMPT = [7, 31, 127, 511, 2047, 8191, 4095, 1023]
ALONE = 8
"""How many of the wide step's requests are answered alone too."""


def lines() -> Iterator[Line]:
    yield from _more_adapters()
    yield from _mixtures()
    yield from _wide_step()


def _more_adapters() -> Iterator[Line]:
    rows: dict[int, Row] = {}
    for adapters in (FEW, SOME, MANY):
        row = newest(
            adapters=adapters,
            rank=[8],
            distribution="uniform",
            dtype="float32",
            requests=384,
            pool_bytes=POOL_BYTES,
        )
        if row is None:
            yield missing(f"{adapters:,} registered, room for 256", COMMAND)
            continue
        rows[adapters] = row
        yield Line(
            f"{adapters:,} registered, room for 256: {said(row)}",
            f"{row['tokens_per_s']:.0f} tokens/s (base {row['base_tokens_per_s']:.0f}); "
            f"{row['distinct_adapters_per_step']:.0f} a step, {row['adapter_loads']} loads",
            f"floor {row['floors']['tokens_per_s']:.0f} tokens/s; reading rank rows {row['floors']['lora_s']:.1f} s",
            row["config"]["repeats"] >= 3 and not row["forced"],
        )
    for fewer, bound in ((SOME, MAX_DROP), (FEW, None)):
        if {fewer, MANY} <= rows.keys():
            yield _drop(rows, fewer, bound)


def _drop(rows: dict[int, Row], fewer: int, bound: float | None) -> Line:
    # Beside the base of its own run: an hour in which the machine is slower is not the adapters'.
    kept = {
        adapters: rows[adapters]["tokens_per_s"] / rows[adapters]["base_tokens_per_s"] for adapters in rows
    }
    drop = 1 - kept[MANY] / kept[fewer]
    floor = 1 - rows[MANY]["floors"]["tokens_per_s"] / rows[fewer]["floors"]["tokens_per_s"]
    return Line(
        f"from {fewer:,} to {MANY:,} adapters, of the base's throughput: drop",
        f"{drop:.1%}; of the floor, {floor:.1%}",
        f"<= {bound:.0%}; `{COMMAND}`" if bound else "reported",
        bound is None or drop <= bound,
    )


def _mixtures() -> Iterator[Line]:
    shared = {
        "adapters": 64,
        "requests": 64,
        "resident": True,
        "distribution": "uniform",
        "dtype": "float32",
    }
    three, one = newest(mixture=3, rank=[8], **shared), newest(mixture=1, rank=[24], **shared)
    point = "mixtures of three adapters of rank 8, beside one of rank 24: time"
    if three is None or one is None:
        yield missing(point, MIXTURES_COMMAND)
        return
    over = one["tokens_per_s"] / three["tokens_per_s"]
    yield Line(
        point,
        f"{over:.2f} ({three['tokens_per_s']:.0f} / {one['tokens_per_s']:.0f} tokens/s; {said(three)})",
        f"<= {MAX_OVER_SINGLE}; `{MIXTURES_COMMAND}`",
        over <= MAX_OVER_SINGLE and not three["forced"] and not one["forced"],
    )


def _wide_step() -> Iterator[Line]:
    """As many requests as adapters, each on its own, in one step; some of them again alone."""
    model = load_model(MODEL)
    params = SamplingParams(max_tokens=WIDE_TOKENS, temperature=0.0, ignore_eos=True)
    with TemporaryDirectory(prefix="manylora-wide-") as folder:
        write_adapters(Path(folder), base_sites(model.config), WIDE, [8], seed=0)
        with _engine(model, Path(folder)) as engine:
            together, most = _answers(engine, [adapter_name(i) for i in range(WIDE)], params)
        with _engine(model, Path(folder)) as engine:
            alone = [_answers(engine, [adapter_name(i)], params)[0][0] for i in range(ALONE)]
    equal = sum(one == other for one, other in zip(alone, together, strict=False))
    yield Line(
        f"{WIDE} distinct adapters in one step",
        f"{most} in one step; {len(set(map(tuple, together)))} different answers; {equal} of {ALONE} as alone",
        f"{WIDE}, and all {ALONE} equal",
        most == WIDE and equal == ALONE and len(set(map(tuple, together))) > WIDE // 2,
    )


def _engine(model: Llama, folder: Path) -> Engine:
    room = WIDE * (adapter_room(model, 8) + sequence_room(model, 64))
    config = EngineConfig(pool_bytes=room, max_num_seqs=WIDE, max_batch_tokens=2048, prefix_caching=False)
    return Engine(model, None, Library(folder), config)


def _answers(engine: Engine, names: list[str], params: SamplingParams) -> tuple[list[list[int]], int]:
    """(tokens of the same prompt on each adapter; most distinct adapters of a step)."""
    numbers = {engine.submit(WIDE_PROMPT, params, name): i for i, name in enumerate(names)}
    answers: list[list[int]] = [[] for _ in names]
    most = 0
    while engine.has_work():
        for output in step(engine):
            answers[numbers[output.request_id]].extend(output.token_ids)
        most = max(most, engine.stats().distinct_adapters_last_step)
    return answers, most
