from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from manylora.errors import ModelError
from manylora.models.convert import save_hf
from manylora.models.gguf_file import GgufFile
from manylora.models.loading import build_model, load_config, load_model
from manylora.models.rope import RopeConfig
from manylora.models.tiny import save_tiny, tiny_config, tiny_weights
from manylora.models.tokenizer import load_tokenizer
from tests.models.gguf_files import write_gguf
from tests.models.oracle import our_logits, their_logits, transformers_model

CONFIG = tiny_config(vocab_size=260, name="tiny-gguf")
TOKENS = torch.arange(0, 250, 5)

CONFIGS = {
    "untied": CONFIG,
    "tied": tiny_config(vocab_size=260, name="tiny-gguf", tie_embeddings=True),
    "linear rope": tiny_config(
        vocab_size=260, name="tiny-gguf", rope=RopeConfig(kind="linear", factor=4.0)
    ),
}
METADATA: dict[str, dict[str, str | int | float]] = {
    "linear rope": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny-gguf.gguf", CONFIG, tiny_weights(CONFIG))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_gives_the_model_it_was_made_from(name, tmp_path):
    config, weights = CONFIGS[name], tiny_weights(CONFIGS[name])
    path = write_gguf(tmp_path / "tiny-gguf.gguf", config, weights, metadata=METADATA.get(name))

    model = load_model(path)

    assert model.config == replace(config, bos_token_id=256)
    assert torch.equal(our_logits(model, TOKENS), our_logits(build_model(config, weights.items()), TOKENS))


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_dequantised_weights_are_those_transformers_reads(kind, tmp_path):
    weights = tiny_weights(CONFIG)
    path = write_gguf(tmp_path / "m.gguf", CONFIG, weights, quantise=gguf.GGMLQuantizationType[kind])

    ours = our_logits(load_model(path), TOKENS)

    assert (ours - our_logits(build_model(CONFIG, weights.items()), TOKENS)).abs().max() > 1e-4
    theirs = their_logits(transformers_model(tmp_path, gguf_file="m.gguf"), TOKENS)
    assert (ours - theirs).abs().max() < 1e-4


def test_metadata_and_tensors_are_those_of_the_gguf_package(path):
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    tensors = dict(ours.tensors())

    assert {f"GGUF.{key}" for key in ("version", "tensor_count", "kv_count")} < set(theirs.fields)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents()
    assert set(tensors) == {tensor.name for tensor in theirs.tensors} == ours.tensor_names
    for tensor in theirs.tensors:
        assert np.array_equal(tensors[tensor.name], gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def test_a_directory_with_one_gguf_is_that_model(path):
    assert load_config(path.parent) == load_config(path)
    renamed = path.rename(path.parent / "model.gguf")
    assert load_config(renamed).name == path.parent.name


def test_a_norm_epsilon_is_the_decimal_that_was_meant(path):
    stored = GgufFile(path).metadata["llama.attention.layer_norm_rms_epsilon"]
    assert stored != 1e-5
    assert load_config(path).rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not served; accepted: llama"),
        ({"llama.expert_count": 8}, r"does not compute: \{'llama.expert_count': 8\}"),
        ({"llama.attention.sliding_window": 128}, "llama.attention.sliding_window"),
        (
            {"llama.rope.dimension_count": 8},
            "llama.rope.dimension_count is 8, served only where it is .* 16",
        ),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length is 8"),
        (
            {"llama.rope.scaling.type": "yarn"},
            "rope scaling 'yarn' is not read from GGUF; accepted: none, linear",
        ),
        ({"llama.rope.scaling.type": "linear"}, r"the GGUF lacks llama\.rope\.scaling\.factor"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(metadata, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tiny_weights(CONFIG), metadata=metadata)
    with pytest.raises(ModelError, match=message):
        load_config(path)


def test_rope_factors_stored_as_a_tensor_are_refused_by_name(tmp_path):
    factors = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tiny_weights(CONFIG), extra_tensors=factors)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight .* use the model's transformers directory"):
        load_config(path)


def test_an_unknown_tensor_is_named(tmp_path):
    unknown = {"blk.0.attn_sinks.weight": np.ones(8, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tiny_weights(CONFIG), extra_tensors=unknown)
    with pytest.raises(ModelError, match=r"missing: none; unexpected: blk\.0\.attn_sinks\.weight"):
        load_model(path)


def test_damaged_files_are_refused(path, tmp_path):
    content = path.read_bytes()
    cases = {
        b"GGML" + content[4:]: "is no GGUF file",
        content[:4] + b"\x07" + content[5:]: "version 7, accepted",
        content[:2000]: "is damaged",
        content[:-20000]: "ends inside tensor .*: the file is truncated",
    }
    for damaged, message in cases.items():
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / "damaged.gguf")


def test_text_is_split_as_the_file_says(tmp_path):
    weights = tiny_weights(CONFIG)
    smollm = load_tokenizer(write_gguf(tmp_path / "smollm.gguf", CONFIG, weights, pre="smollm"))
    llama = load_tokenizer(write_gguf(tmp_path / "llama.gguf", CONFIG, weights, pre="llama-bpe"))

    # Digits stand alone, so both spaces before one merge; GPT-2's rule would keep the second one with the digit.
    assert smollm.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert smollm.tokenize("a\n\n1.") == ["a", "ĊĊ", "1", "."]
    # Up to three digits stay together, and a text begins with the BOS token, which is <|end|> here.
    assert llama.tokenize("a 1212") == ["a", "Ġ", "12", "1", "2"]
    assert llama("a").input_ids == [256, 97]
    for tokenizer in (smollm, llama):
        assert (
            tokenizer.decode(tokenizer("Grüße  12\n\n😀").input_ids, skip_special_tokens=True)
            == "Grüße  12\n\n😀"
        )


def test_a_sentencepiece_vocabulary_is_read(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", CONFIG, tiny_weights(CONFIG), pre=None))
    assert tokenizer.tokenize("ab a12") == ["▁ab", "▁a", "1", "2"]
    assert tokenizer("é").input_ids == [1, 259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer("ab é12</s>").input_ids, skip_special_tokens=True) == "ab é12"


def test_special_tokens_and_the_chat_template_come_with_the_file(path):
    tokenizer = load_tokenizer(path)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == [72, 105, 256]
    assert tokenizer.decode([72, 105, 256], skip_special_tokens=True) == "Hi"
    assert tokenizer.eos_token_id == 256
    assert load_config(path).eos_token_ids == (256,)


def test_an_unknown_way_to_split_text_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tiny_weights(CONFIG), pre="mystery")
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.pre is 'mystery'; accepted: smollm, llama-bpe"):
        load_tokenizer(path)


def test_a_saved_directory_is_the_same_model_for_transformers(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "tiny-gguf.gguf", CONFIG, tiny_weights(CONFIG), quantise=kind)

    directory = save_hf(path, tmp_path / "saved")

    ours = our_logits(load_model(path), TOKENS)
    assert torch.equal(our_logits(load_model(directory), TOKENS), ours)
    assert (their_logits(transformers_model(directory), TOKENS) - ours).abs().max() < 1e-4
    for text in ("a  12\n\n1. b", "Grüße<|end|>"):
        assert load_tokenizer(directory)(text).input_ids == load_tokenizer(path)(text).input_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert load_tokenizer(directory).apply_chat_template(messages)["input_ids"] == [72, 105, 256]
    assert load_config(directory).eos_token_ids == (256,)


def test_a_saved_directory_may_be_of_fewer_bits(tmp_path):
    path = write_gguf(tmp_path / "tiny-gguf.gguf", CONFIG, tiny_weights(CONFIG))
    wide, narrow = (
        load_file(save_hf(path, tmp_path / str(dtype), dtype=dtype) / "model.safetensors")
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)
    assert any((narrow[name].float() != wide[name]).any() for name in wide), "nothing was rounded"


def test_a_directory_that_needs_no_conversion_is_refused(tmp_path):
    directory = save_tiny(tmp_path / "tiny")
    with pytest.raises(ModelError, match="model 'tiny' is laid out for transformers already"):
        save_hf(directory, tmp_path / "saved")
