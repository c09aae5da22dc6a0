"""One buffer for all pairs of a file, however its tensors lie in it, and the work that files of one kind share."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from manylora.errors import AdapterFormatError
from manylora.lora import formats
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.formats import CONFIG_FILE, TENSOR_FILE, load_peft, save_peft
from manylora.lora.pairs import PackedPairs, PairTable
from manylora.lora.spans import KnownSpans, PairSpans

SITES = ("layers.0.q", "layers.1.q", "layers.1.q.inner", "layers.10.q")
"""The third sorts after the second, but its tensors' names before the second's."""


def tensors(
    seed: int, dtype: torch.dtype = torch.bfloat16, odd: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Rank 3 at each site; `odd`: the dtype of the last one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for site in SITES:
        kind = odd if odd and site == SITES[-1] else dtype
        made[f"base_model.model.{site}.lora_A.weight"] = torch.randn(3, 7, generator=generator).to(kind)
        made[f"base_model.model.{site}.lora_B.weight"] = torch.randn(5, 3, generator=generator).to(kind)
    return made


def write(
    folder: Path, held: dict[str, Tensor], metadata: dict[str, str] | None = None, **config: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q", "inner"]} | config
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    (folder / TENSOR_FILE).write_bytes(save(held, metadata))
    return folder


def check_pairs(adapter: Adapter, held: dict[str, Tensor]) -> None:
    assert list(adapter.sites) == sorted(SITES)
    for site, pair in adapter.sites.items():
        for half in "AB":
            wanted = held[f"base_model.model.{site}.lora_{half}.weight"].to(adapter.dtype)
            assert wanted.abs().min() > 0
            assert torch.equal(getattr(pair, f"lora_{half.lower()}"), wanted)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose tensors are looked at one by one, from now on, with nothing known yet."""
    seen: list[Path] = []
    spans_of = formats._spans

    def noted(config, data, folder):
        seen.append(folder)
        return spans_of(config, data, folder)

    monkeypatch.setattr(formats, "_spans", noted)
    monkeypatch.setattr(formats, "_KNOWN", KnownSpans())
    return seen


@pytest.mark.parametrize(
    ("dtype", "odd"),
    [(torch.bfloat16, None), (torch.float32, None), (torch.float16, torch.bfloat16)],
    ids=["bf16", "fp32", "mixed"],
)
def test_pairs_are_those_of_the_file_whatever_the_order_of_its_tensors(tmp_path, dtype, odd):
    held = tensors(0, dtype, odd)
    adapter = load_peft(write(tmp_path / "a", held))
    check_pairs(adapter, held)
    assert adapter.dtype == (torch.float32 if odd else dtype)
    # The same pairs as tensors of their own are the same adapter.
    apart = {
        site: LoraPair(p.lora_a.clone(), p.lora_b.clone(), p.scaling) for site, p in adapter.sites.items()
    }
    assert Adapter(apart).identity == adapter.identity
    save_peft(adapter, tmp_path / "b")
    assert load_peft(tmp_path / "b").identity == adapter.identity


def test_what_begins_alike_is_worked_out_once(tmp_path, parsed):
    folders = [write(tmp_path / f"{seed}", tensors(seed)) for seed in range(4)]
    adapters = [load_peft(folder) for folder in folders]
    assert parsed == folders[:1]
    for seed, adapter in enumerate(adapters):
        check_pairs(adapter, tensors(seed))
    assert len({adapter.identity for adapter in adapters}) == 4
    # PEFT writes a set of names in any order.
    load_peft(write(tmp_path / "shuffled", tensors(5), target_modules=["inner", "q"]))
    assert parsed == folders[:1]


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 7}, {"use_rslora": True}, {"target_modules": ["q", "inner", "k"]}]
)
def test_another_config_is_worked_out_anew(tmp_path, parsed, change):
    first = load_peft(write(tmp_path / "a", tensors(0)))
    other = load_peft(write(tmp_path / "b", tensors(0), **change))
    assert len(parsed) == 2
    assert (other.identity == first.identity) == ("target_modules" in change)


def test_a_config_that_refuses_is_not_hidden_by_one_that_did_not(tmp_path):
    load_peft(write(tmp_path / "a", tensors(0)))
    with pytest.raises(AdapterFormatError, match="target_modules"):
        load_peft(write(tmp_path / "b", tensors(0), target_modules=["q"]))
    with pytest.raises(AdapterFormatError, match="rank 4"):
        load_peft(write(tmp_path / "b", tensors(0), r=4))


@pytest.mark.parametrize("cut", [1, 40, -3])
def test_a_file_that_begins_alike_but_ends_elsewhere_is_refused(tmp_path, cut):
    load_peft(write(tmp_path / "a", tensors(0)))
    path = write(tmp_path / "b", tensors(1)) / TENSOR_FILE
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if cut > 0 else data + bytes(-cut))
    with pytest.raises(AdapterFormatError, match=r"truncated|goes on"):
        load_peft(tmp_path / "b")


def test_a_value_that_is_not_finite_is_named_with_its_site(tmp_path):
    load_peft(write(tmp_path / "a", tensors(0)))
    for value in (float("nan"), float("inf"), float("-inf")):
        held = tensors(1)
        held[f"base_model.model.{SITES[1]}.lora_B.weight"][2, 1] = value
        with pytest.raises(AdapterFormatError, match=rf"'{SITES[1]}': lora_b holds NaN or Inf in 1 of 15"):
            load_peft(write(tmp_path / "b", held))


def test_what_was_read_does_not_change_with_its_file(tmp_path):
    folder = write(tmp_path / "a", tensors(0))
    adapter = load_peft(folder)
    (folder / TENSOR_FILE).write_bytes(b"\0" * (folder / TENSOR_FILE).stat().st_size)
    check_pairs(adapter, tensors(0))


def test_an_odd_start_of_the_values_is_read(tmp_path):
    # Writers other than safetensors' own need not align what follows the header.
    path = write(tmp_path / "a", tensors(0)) / TENSOR_FILE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    adapter = load_peft(tmp_path / "a")
    check_pairs(adapter, tensors(0))
    assert isinstance(adapter.sites, PackedPairs)
    assert adapter.packed.buffer.data_ptr() % 2 == 0


def test_only_so_many_are_kept_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr("manylora.lora.spans.MAX_KEPT", 2)
    known = KnownSpans()
    table = PairTable({}, torch.float32)
    a, b, c = (PairSpans(table, [], size) for size in range(3))
    known.keep("a", a)
    known.keep("b", b)
    assert known.get("a") is a
    known.keep("c", c)
    assert [known.get(key) for key in "abc"] == [a, None, c]
