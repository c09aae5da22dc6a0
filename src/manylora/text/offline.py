"""Prompts run to their ends, for a caller who has them all: an engine's submit, step and cancel put together."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from manylora.errors import ConfigError, ManyLoraError
from manylora.lora.mixture import Mixture, MixtureLike
from manylora.text.intake import Prompt
from manylora.text.output import Completion, Output, join, refused
from manylora.text.params import SamplingParams

if TYPE_CHECKING:
    from manylora.text.engine import Engine

_Key = tuple[str, int]  # request id and index of a sample


def completions(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    mixtures: Sequence[MixtureLike] | None,
) -> Generator[Completion]:
    """See Engine.completions."""
    num = len(prompts)
    each = [params] * num if params is None or isinstance(params, SamplingParams) else list(params)
    mixed = [None] * num if mixtures is None else list(mixtures)
    if not num == len(each) == len(mixed):
        raise ConfigError(f"{num} prompts, {len(each)} params and {len(mixed)} mixtures do not match")
    slots: list[Completion | _Key] = []
    wanted: dict[_Key, Mixture] = {}
    parts: dict[_Key, list[Output]] = {}  # of those that have not ended
    done: dict[_Key, Completion] = {}
    try:
        for prompt, one, mixture in zip(prompts, each, mixed, strict=True):
            indices = range(one.n if one else 1)
            try:
                parsed = Mixture.parse(mixture)
                request_id = engine.submit(prompt, one, parsed)
            except ManyLoraError as error:
                slots += [refused(error, index) for index in indices]
                continue
            keys = [(request_id, index) for index in indices]
            slots += keys
            wanted |= dict.fromkeys(keys, parsed)
            parts |= {key: [] for key in keys}
        for slot in slots:
            while isinstance(slot, tuple) and slot not in done:
                for output in engine.step():
                    key = (output.request_id, output.index)
                    if key not in parts:
                        continue
                    parts[key].append(output)
                    if output.event is not None:
                        done[key] = join(wanted[key], parts.pop(key))
            yield done.pop(slot) if isinstance(slot, tuple) else slot
    finally:
        for request_id in {request_id for request_id, _ in parts}:
            engine.cancel(request_id)
