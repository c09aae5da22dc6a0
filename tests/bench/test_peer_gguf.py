"""What llama.cpp is given: the same weights, and adapters in the order of channels that a GGUF has."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from manylora.bench.peers.gguf import KINDS, write_adapter, write_model
from manylora.errors import ConfigError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.formats import load_peft, save_peft
from manylora.lora.synthetic import random_adapter
from manylora.models.gguf import GgufModel
from manylora.models.gguf_file import GgufFile
from manylora.models.sites import base_sites
from manylora.models.tiny import tiny_config, tiny_weights
from tests.models.gguf_files import NAMES, write_gguf

CONFIG = tiny_config(vocab_size=260, name="tiny-gguf")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(
        tmp_path / "m.gguf", CONFIG, tiny_weights(CONFIG), quantise=gguf.GGMLQuantizationType.Q4_1
    )


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(GgufModel(path, name="tiny-gguf").tensors())


def test_float32_holds_the_weights_that_are_served(source, tmp_path):
    write_model(source, tmp_path / "f32.gguf", "f32")
    before, after = weights_of(source), weights_of(tmp_path / "f32.gguf")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The weights that it was made from are others: those served are rounded.
    assert not torch.equal(
        tiny_weights(CONFIG)["model.embed_tokens.weight"], after["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_have_the_format_asked_for_and_norms_are_float32(source, tmp_path, kind):
    write_model(source, tmp_path / "written.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "written.gguf")
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert {kinds[name] for name in kinds if "norm" not in name} == {KINDS[kind][0]}
    assert {kinds[name] for name in kinds if "norm" in name} == {gguf.GGMLQuantizationType.F32}
    assert reader.fields["general.file_type"].contents() == KINDS[kind][1]


def test_q8_0_is_near_the_weights(source, tmp_path):
    write_model(source, tmp_path / "q8_0.gguf", "q8_0")
    before, after = weights_of(source), weights_of(tmp_path / "q8_0.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    error = (before[name] - after[name]).abs().max() / before[name].abs().max()
    assert 0 < error < 0.01


def test_metadata_and_vocabulary_are_kept(source, tmp_path):
    write_model(source, tmp_path / "f32.gguf", "f32")
    before, after = GgufFile(source).metadata, GgufFile(tmp_path / "f32.gguf").metadata
    assert len(before["tokenizer.ggml.tokens"]) == 260
    assert dict(before) == {name: after[name] for name in before}


def test_an_adapter_added_to_a_gguf_gives_the_sum_that_it_gives_here(source, tmp_path):
    """In a GGUF the rows of q and k lie otherwise. Added there and read back, the delta is that of the adapter."""
    generator = torch.Generator().manual_seed(3)
    made = random_adapter(base_sites(CONFIG), 3, generator, strength=0.5, name="a")
    # Not 1: a scaling that is left out shows.
    pairs = {s: LoraPair(p.lora_a, p.lora_b, scaling=2.0) for s, p in made.sites.items()}
    save_peft(Adapter(pairs, name="a"), tmp_path / "a")
    write_adapter(tmp_path / "a", tmp_path / "a.gguf", CONFIG)

    delta = {
        t.name: np.array(t.data).reshape(t.shape[::-1])
        for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors
    }
    writer = gguf.GGUFWriter(tmp_path / "sum.gguf", "llama")
    fields = gguf.GGUFReader(source).fields
    for name, field in fields.items():
        if name.startswith(("llama.", "tokenizer.")):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for name, values in GgufFile(source).tensors():
        lora = (
            delta[f"{name}.lora_b"] @ delta[f"{name}.lora_a"]
            if f"{name}.lora_a" in delta
            else np.float32(0)
        )
        writer.add_tensor(name, np.ascontiguousarray(values + lora, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    base, added = weights_of(source), weights_of(tmp_path / "sum.gguf")
    adapter = load_peft(tmp_path / "a")
    assert len(adapter.sites) == CONFIG.num_layers * 7
    for site, pair in adapter.sites.items():
        wanted = pair.scaling * pair.lora_b.float() @ pair.lora_a.float()
        assert wanted.abs().max() > 0.01
        found = added[f"{site}.weight"] - base[f"{site}.weight"]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_adapters_are_marked_as_llama_cpp_wants_them(tmp_path):
    adapter = random_adapter(base_sites(CONFIG), 2, torch.Generator(), strength=0.1, name="a")
    save_peft(adapter, tmp_path / "a")
    write_adapter(tmp_path / "a", tmp_path / "a.gguf", CONFIG)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    wanted = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    assert {name: reader.fields[name].contents() for name in wanted} == wanted
    assert len(reader.tensors) == 2 * 7 * CONFIG.num_layers
    known = set(NAMES.values())
    assert {tensor.name.split(".")[2] for tensor in reader.tensors} <= known


def test_a_site_without_a_name_is_refused(tmp_path):
    pair = LoraPair(torch.ones(1, 4), torch.ones(4, 1), scaling=1.0)
    save_peft(Adapter({"model.embed": pair}, name="a"), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"site 'model\.embed' has no name"):
        write_adapter(tmp_path / "a", tmp_path / "a.gguf", CONFIG)
