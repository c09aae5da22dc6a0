"""As many requests as adapters, each on its own, in one step. Run here and now."""

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
from points import Line

MODEL = "smollm2-135m-instruct"
WIDE = 256
PROMPT = [7, 31, 127, 511, 2047, 8191, 4095, 1023]
NUM_TOKENS = 32
"""Enough for the last adapter to be there before the first request ends."""

ALONE = 8
"""How many of the requests are answered alone too."""


def lines() -> Iterator[Line]:
    model = load_model(MODEL)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
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
    numbers = {engine.submit(PROMPT, params, name): i for i, name in enumerate(names)}
    answers: list[list[int]] = [[] for _ in names]
    most = 0
    while engine.has_work():
        for output in step(engine):
            answers[numbers[output.request_id]].extend(output.token_ids)
        most = max(most, engine.stats().distinct_adapters_last_step)
    return answers, most
