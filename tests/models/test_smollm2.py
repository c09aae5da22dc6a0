"""The real demo model: SmolLM2-135M-Instruct as a Q4_1 GGUF file."""

import pytest
import torch
from torch import Tensor

from manylora.models.convert import save_hf
from manylora.models.llama import Llama
from manylora.models.loading import load_model
from manylora.models.tokenizer import load_tokenizer
from tests.models.oracle import our_logits, their_logits, transformers_model

pytestmark = pytest.mark.model

TEXT = "The lighthouse keeper wrote:\n\n1. Lamp oil, 12 litres.\n2. Rope.\n\nThen the storm came, and"


@pytest.fixture(scope="module")
def model(smollm2_path) -> Llama:
    return load_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return load_tokenizer("smollm2-135m-instruct")


def test_the_config_is_the_published_one(model):
    config = model.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rms_norm_eps, config.rope.theta, config.max_position) == (1e-5, 1e5, 8192)
    assert config.tie_embeddings
    assert config.vocab_size == 49152


def test_an_answer_ends_where_the_turn_does(model, tokenizer):
    assert model.config.eos_token_ids == (2,)
    assert tokenizer.convert_ids_to_tokens(2) == tokenizer.eos_token == "<|im_end|>"


def test_text_is_tokenised_as_the_model_was_trained(tokenizer):
    assert tokenizer.tokenize("x\n\n1. Go  on 24") == [
        "x",
        "ĊĊ",
        "1",
        ".",
        "ĠGo",
        "Ġ",
        "Ġon",
        "Ġ",
        "2",
        "4",
    ]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT


def test_a_chat_is_answered_with_sense(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]

    answer = [*tokenizer("The capital of France is Paris.").input_ids, 2]

    logits = our_logits(model, torch.tensor(prompt + answer[:-1]))

    # Each token is the most likely one after those before it, so this is the greedy answer, by one forward pass.
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == answer


@pytest.mark.slow
def test_logits_equal_transformers(model, tokenizer, smollm2_path, tmp_path):
    tokens: Tensor = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    ours = our_logits(model, tokens)
    directory = save_hf("smollm2-135m-instruct", tmp_path / "saved")

    saved = their_logits(transformers_model(directory), tokens)
    read_from_gguf = their_logits(
        transformers_model(smollm2_path.parent, gguf_file=smollm2_path.name), tokens
    )

    assert ours.std() > 1
    assert (ours - saved).abs().max() < 2e-4
    assert (ours - read_from_gguf).abs().max() < 2e-4
    assert load_tokenizer(directory)(TEXT).input_ids == tokens.tolist()
