"""`manylora bench steps`: how does the time of a decode step grow with its sequences, their context, their rank?

The engine runs the steps: every sequence has a prompt of its own and an adapter of its own, all resident. Prompts are
computed in one step, so that all sequences are equally long when the steps begin that are timed. Beside each table
stands the line that fits it best; a bend in it is a change of what bounds the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from manylora.bench.adapters import adapter_name, write_adapters
from manylora.bench.ceilings import torch_threads
from manylora.bench.engine import adapter_room, sequence_room, step
from manylora.bench.machine import LoadWatch, check_idle, describe_machine, describe_revision
from manylora.bench.settings import command_line, told
from manylora.bench.steps.config import Point, StepsConfig
from manylora.bench.steps.cost import sizes_of
from manylora.bench.steps.fit import StepTable
from manylora.bench.steps.result import StepsResult
from manylora.errors import ConfigError
from manylora.lora.library import Library
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.models.sites import base_sites
from manylora.text import Engine, EngineConfig, SamplingParams

Report = Callable[[str], None]
"""Told in a few words what begins now."""


def run(config: StepsConfig, report: Report = lambda _: None) -> StepsResult:
    """Measure.

    Raises:
        ConfigError: the machine is busy, unless `force`; or a context is longer than the model's.
    """
    report("looking whether the machine is idle")
    forced = check_idle(force=config.force)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    report("loading the model")
    model = load_model(config.model, dtype=config.dtype)
    longest = max(*config.context, config.at_context) + config.steps
    if longest > model.config.max_position:
        raise ConfigError(
            f"contexts of {longest} tokens exceed the {model.config.max_position} of {config.model}"
        )
    tables = config.tables()
    points = sorted({point for table in tables.values() for point in table.values()})
    samples_s: dict[Point, list[float]] = {point: [] for point in points}
    with TemporaryDirectory(prefix="manylora-steps-") as folder, torch_threads(config.num_threads):
        _write_adapters(Path(folder), model, points, config.seed, report)
        watch = LoadWatch()
        for repeat in range(config.repeats):
            for point in points:
                report(f"round {repeat + 1} of {config.repeats}: {point}")
                steps_s = time_steps(
                    model, _library(Path(folder), point.rank), point, config.steps, config.seed
                )
                samples_s[point].append(median(steps_s))
        load = watch.stop()
    revision = describe_revision()
    return StepsResult(
        tables={
            name: StepTable.of({value: samples_s[point] for value, point in table.items()})
            for name, table in tables.items()
        },
        sizes=sizes_of(model.config),
        threads=config.num_threads,
        config=told(config),
        command=command_line("steps", config),
        commit=revision.commit,
        dirty=revision.dirty,
        started=started,
        machine=describe_machine(),
        load=load,
        forced=forced,
    )


def time_steps(model: Llama, library: Library, point: Point, num_steps: int, seed: int) -> list[float]:
    """Return the seconds of `num_steps` steps at a point: all its sequences decode in each."""
    seconds = []
    with decoding(model, library, point, num_steps, seed) as one_step:
        for _ in range(num_steps):
            began_s = time.perf_counter()
            one_step()
            seconds.append(time.perf_counter() - began_s)
    return seconds


@contextmanager
def decoding(
    model: Llama, library: Library, point: Point, num_steps: int, seed: int
) -> Iterator[Callable[[], None]]:
    """What steps an engine whose every sequence decodes, up to `num_steps` times; half way they are at the point."""
    prompt_len = point.context - num_steps // 2
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(
        model.config.vocab_size, (point.batch, prompt_len), generator=generator
    ).tolist()
    with Engine(model, None, library, _engine_config(model, point, prompt_len, num_steps)) as engine:
        engine.warm_up()
        # One token on each adapter: then all are resident, and all prompts fit into one step.
        _submit(engine, [[0]] * point.batch, 1)
        while engine.has_work():
            _step(engine)
        _submit(engine, prompts, num_steps + 2)
        assert _step(engine) == point.batch, "a prompt was left out of the first step"

        def one_step() -> None:
            num_tokens = _step(engine)
            assert num_tokens == point.batch, "a sequence was left out of a step"

        yield one_step


def _step(engine: Engine) -> int:
    """Step; returns how many tokens that brought."""
    return sum(len(output.token_ids) for output in step(engine))


def _submit(engine: Engine, prompts: Sequence[list[int]], num_tokens: int) -> None:
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.submit(prompt, params, adapter_name(number))


def _engine_config(model: Llama, point: Point, prompt_len: int, num_steps: int) -> EngineConfig:
    """Room for everybody at a time, and steps that take in all prompts at once."""
    each = adapter_room(model, point.rank) + sequence_room(model, prompt_len + num_steps + 2)
    return EngineConfig(
        pool_bytes=point.batch * each,
        max_num_seqs=point.batch,
        max_batch_tokens=point.batch * prompt_len,
        prefix_caching=False,
    )


def _write_adapters(folder: Path, model: Llama, points: Sequence[Point], seed: int, report: Report) -> None:
    """For each rank as many adapters as the largest batch on it names."""
    for rank in sorted({point.rank for point in points}):
        count = max(point.batch for point in points if point.rank == rank)
        report(f"writing {count} adapters of rank {rank}")
        root = _root(folder, rank)
        root.mkdir()
        write_adapters(root, base_sites(model.config), count, [rank], seed)


def _library(folder: Path, rank: int) -> Library:
    return Library(_root(folder, rank))


def _root(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"
