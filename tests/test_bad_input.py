"""Bad input: each kind is refused with a message that names the thing, what came, what to do; the others go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    CapacityError,
    ManyLoraError,
    RequestError,
)
from manylora.lora.formats import save_peft
from manylora.lora.library import Library
from manylora.lora.mixture import MixtureLike
from manylora.models.tiny import tiny_adapter, tiny_config
from tests.text.engines import CONFIG, GREEDY, adapters, engine, expect

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SITE = "base_model.model.model.layers.0.self_attn.q_proj"


def as_it_is(folder: Path) -> None:
    """The adapter is sound; the request is not."""


def of_another_architecture(folder: Path) -> None:
    other = tiny_config(hidden_size=32, intermediate_size=48)
    save_peft(tiny_adapter(other, seed=1), folder)


def truncated(folder: Path) -> None:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])


def with_nan(folder: Path) -> None:
    _change_tensors(folder, {f"{SITE}.lora_A.weight": lambda a: a.fill_(float("nan"))})


def of_rank_0(folder: Path) -> None:
    empty = {
        f"{SITE}.lora_A.weight": lambda a: a[:0].clone(),
        f"{SITE}.lora_B.weight": lambda b: b[:, :0].clone(),
    }
    _change_tensors(folder, empty)


def with_an_unknown_site(folder: Path) -> None:
    adapter = tiny_adapter(CONFIG, seed=1)
    sites = {site.replace("self_attn", "cross_attn"): pair for site, pair in adapter.sites.items()}
    save_peft(replace(adapter, sites=sites), folder)


def with_an_unknown_key(folder: Path) -> None:
    _change_config(folder, {"frobnicate": 3})


def with_dora(folder: Path) -> None:
    _change_config(folder, {"use_dora": True})


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def _change_config(folder: Path, values: dict[str, object]) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))


def _change_tensors(folder: Path, changes: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(
        {name: changes.get(name, lambda t: t)(tensor) for name, tensor in tensors.items()},
        folder / WEIGHTS_FILE,
    )


@dataclass(frozen=True)
class Case:
    spoil: Callable[[Path], None]
    error: type[ManyLoraError]
    says: tuple[str, ...]
    """Parts of the message: the thing, what was expected, what came, what to do."""
    mixture: MixtureLike = "bad"
    prompt: tuple[int, ...] = (1, 2, 3)


CASES = {
    "adapter of another architecture": Case(
        of_another_architecture, AdapterMismatchError, ("'bad'", "tiny-llama", "down_proj", "in 64", "in 32")
    ),
    "truncated safetensors": Case(truncated, AdapterFormatError, ("bad", WEIGHTS_FILE, "bytes")),
    "NaN weights": Case(with_nan, AdapterFormatError, ("'bad'", "layers.0.self_attn.q_proj", "lora_a")),
    "rank 0": Case(of_rank_0, AdapterFormatError, ("bad", "q_proj", "rank")),
    "unknown site": Case(
        with_an_unknown_site, AdapterMismatchError, ("'bad'", "cross_attn", "tiny-llama", "self_attn")
    ),
    "unknown config key": Case(with_an_unknown_key, AdapterFormatError, ("bad", "frobnicate")),
    "DoRA": Case(with_dora, AdapterFormatError, ("bad", "use_dora")),
    "pickle": Case(pickled, AdapterFormatError, ("bad", ".bin", "safetensors")),
    "missing adapter": Case(as_it_is, AdapterNotFoundError, ("'bda'", "bad"), "bda"),
    "weight that is not finite": Case(as_it_is, RequestError, ("'bad'", "finite", "nan"), {"bad": float("nan")}),
    "adapter named twice": Case(as_it_is, RequestError, ("'bad'", "twice", "add its weights up"), "bad:1+bad:0.5"),
    "prompt longer than the pool": Case(as_it_is, CapacityError, ("235", "60 pages", "more memory"), "bad", (1,) * 235),
    "empty prompt": Case(as_it_is, RequestError, ("empty", "at least one token"), "bad", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_harms_nobody(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for good in ("a", "c"):
        save_peft(adapters()[good], tmp_path / good)
    save_peft(adapters()["b"], tmp_path / "bad")
    case.spoil(tmp_path / "bad")
    prompts = [[5, 6], list(case.prompt), [7, 8, 9], [5, 6]]
    mixtures: list[MixtureLike] = ["a", case.mixture, {"a": 0.5, "c": 1.0}, None]
    with engine(num_pages=60, source=Library(tmp_path)) as served:
        completions = served.generate(prompts, GREEDY, mixtures)
        # What was refused left nothing behind: the same good requests again, and no page is held.
        again = served.generate([prompts[0]], GREEDY, ["a"])
        assert served.stats().pool_bytes.kv_in_use == 0
    refused = completions.pop(1)
    assert type(refused.error) is case.error, refused.error
    for part in case.says:
        assert part in str(refused.error)
    wanted = [expect(p, m) for p, m in ((prompts[0], "a"), (prompts[2], mixtures[2]), (prompts[3], None))]
    assert [c.token_ids for c in completions] == wanted
    assert again[0].token_ids == wanted[0]
    assert wanted[0] != wanted[2]
