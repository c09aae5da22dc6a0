import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manylora.errors import ConfigError, ModelError
from manylora.kernels.native import tiles
from manylora.models.dense_attention import DenseAttention
from manylora.models.loading import MODEL_DTYPES, build_model, load_config, load_model
from manylora.models.sites import Stack
from manylora.models.tiny import save_tiny, tiny_config, tiny_model, tiny_weights
from manylora.models.tokenizer import load_tokenizer
from tests.models.oracle import our_logits, their_logits, transformers_model

TOKENS = torch.arange(0, 250, 7)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rewrite_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
def test_a_directory_gives_the_model_that_was_saved(dtype, directory):
    model = load_model(directory, dtype=dtype)
    assert model.config == tiny_config(name="tiny")
    assert model.dtype == MODEL_DTYPES[dtype]
    assert torch.equal(our_logits(model, TOKENS), our_logits(tiny_model(dtype=dtype), TOKENS))


def test_shards_are_read_as_one(directory):
    whole = our_logits(load_model(directory), TOKENS)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    huggingface_hub.save_torch_state_dict(tensors, directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2

    sharded = our_logits(load_model(directory), TOKENS)

    assert torch.equal(sharded, whole)
    assert (sharded - their_logits(transformers_model(directory), TOKENS)).abs().max() < 1e-4


def test_a_missing_shard_is_named(directory):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors cannot be read"):
        load_model(directory)


def test_missing_and_unexpected_tensors_are_named(directory):
    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
        del tensors["model.norm.weight"]

    rewrite(directory, swap)

    with pytest.raises(ModelError) as error:
        load_model(directory)
    missing, unexpected = str(error.value).split("; unexpected: ")
    assert "model.layers.0.mlp.gate_proj.weight, model.norm.weight" in missing
    assert unexpected == "model.layers.0.mlp.gate.weight"


def test_many_missing_tensors_are_counted(directory):
    rewrite_config(directory, num_hidden_layers=3)
    with pytest.raises(
        ModelError, match=r"missing: model\.layers\.2\.input_layernorm\.weight, .* \(\+ 5 more\)"
    ):
        load_model(directory)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(65), torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.float8_e4m3fn)],
)
def test_a_tensor_that_does_not_fit_is_named(tensor, directory):
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": tensor}))
    with pytest.raises(ModelError, match=r"tensor 'model\.norm\.weight' must be \[64\] of floating point"):
        load_model(directory)


def test_an_output_weight_beside_a_tied_embedding_must_be_the_same(tmp_path):
    config = tiny_config(tie_embeddings=True)
    weights = tiny_weights(config)
    twin = weights["model.embed_tokens.weight"].clone()

    model = build_model(config, {"lm_head.weight": twin, **weights}.items())
    assert torch.equal(our_logits(model, TOKENS), our_logits(tiny_model(config), TOKENS))

    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        build_model(config, {"lm_head.weight": twin + 1, **weights}.items())


def test_stored_rope_frequencies_of_old_files_are_passed_over():
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    model = build_model(tiny_config(), (tiny_weights(tiny_config()) | frequencies).items())
    assert torch.equal(our_logits(model, TOKENS), our_logits(tiny_model(), TOKENS))


def test_generation_config_says_which_tokens_end_an_answer(directory):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 256]}))
    assert load_config(directory).eos_token_ids == (7, 256)
    (directory / "generation_config.json").unlink()
    assert load_config(directory).eos_token_ids == (256,)


def test_weights_of_half_width_are_widened_exactly(directory):
    rewrite(directory, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    model = load_model(directory)
    want = tiny_weights(tiny_config())["model.layers.1.mlp.down_proj.weight"].bfloat16().float()
    assert torch.equal(model.base_product(1, Stack.DOWN).dense_weight(), want)


def test_damaged_files_are_refused(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_model(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json must be a JSON object, got list"):
        load_model(directory)


def test_pickled_weights_are_refused(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"no model\.safetensors .*Pickled weights \(\.bin, \.pt\) are not read"
    ):
        load_model(directory)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no model 'no/such/thing'"):
        load_model("no/such/thing")
    with pytest.raises(ModelError, match=r"holds neither config\.json nor a \.gguf file"):
        load_model(tmp_path)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"is a file, but no \.gguf"):
        load_model(tmp_path / "weights.bin")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(
        ModelError, match=r"holds several GGUF files, name one of them: \['a.gguf', 'b.gguf'\]"
    ):
        load_model(tmp_path)


def test_an_unknown_dtype_is_refused(directory):
    for dtype in ("int4", torch.int8):
        with pytest.raises(ConfigError, match="a model's dtype is one of"):
            load_model(directory, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "", "meta", "hpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(directory, device):
    with pytest.raises(
        ConfigError, match=rf"device '{device}' cannot be used; here torch has \['cpu'.*\]: .+"
    ):
        load_model(directory, device=device)


def test_int8_rounds_the_products_and_nothing_else(directory):
    exact, rounded = load_model(directory), load_model(directory, dtype="int8")
    products = [rounded.base_product(0, stack) for stack in Stack] + [rounded.output]
    assert {product.implementation for product in products} == {"tiles" if tiles.is_available() else "int8"}
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded.embedding, exact.embedding)
    tokens = torch.arange(24) % exact.config.vocab_size
    logits = []
    for model in (exact, rounded):
        attention = DenseAttention([24], scale=model.config.attention_scale)
        logits.append(model(tokens, attention.positions, attention))
    error = (logits[1] - logits[0]).square().mean().sqrt() / logits[0].square().mean().sqrt()
    assert 0 < error < 0.1


def test_int8_is_refused_elsewhere_than_on_a_cpu(directory):
    with pytest.raises(ConfigError, match="int8 runs on a CPU, got device cuda"):
        load_model(directory, dtype="int8", device="cuda")


def test_the_absent_demo_model_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelError, match="fetch it with `make model`"):
        load_model("smollm2-135m-instruct")


def test_a_hub_id_is_fetched_without_other_libraries_files(monkeypatch, directory):
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    config = load_config("some-org/Some-Model-1.0")

    assert config == tiny_config(name="some-org/Some-Model-1.0")
    [(repo_id, patterns)] = asked
    assert repo_id == "some-org/Some-Model-1.0"
    wanted = {path.name for path in directory.iterdir()} | {
        "model-00001-of-00002.safetensors",
        "merges.txt",
    }
    unwanted = {"pytorch_model.bin", "consolidated.safetensors", "model.onnx", "README.md"}
    matched = {name for name in wanted | unwanted if any(fnmatch(name, pattern) for pattern in patterns)}
    assert matched == wanted


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelError, match="model 'org/name' is no directory here, not in the hub's cache, and could not"
    ):
        load_model("org/name")


def test_a_tokenizer_comes_with_the_directory(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer("aé").input_ids == [97, 195, 169]
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "user: Hi<|end|>assistant: "


def test_a_directory_without_a_tokenizer_is_an_error_that_names_the_model(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="model 'tiny': no tokenizer could be loaded"):
        load_tokenizer(directory)
    shutil.rmtree(directory)
    with pytest.raises(ModelError, match="no model"):
        load_tokenizer(directory)
