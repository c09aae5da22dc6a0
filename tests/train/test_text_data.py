import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import DataError
from manylora.train.text_data import IGNORED, Example, make_batch, plan_batches, tokenize_rows
from tests.train.tiny import tiny_tokenizer


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def parts(example, tokenizer):
    """(all text, text that the loss counts)"""
    targets = [
        token for token, is_target in zip(example.tokens, example.is_target, strict=True) if is_target
    ]
    return tokenizer.decode(example.tokens), tokenizer.decode(targets)


CHATS = {
    "one turn": (
        chat(("user", "hi"), ("assistant", "ho")),
        "<|user|>hi<|end|>\n<|assistant|>ho<|end|>",
        "ho<|end|>",
    ),
    "two turns, a system message": (
        chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        "<|system|>s<|end|>\n<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>d<|end|>",
        "b<|end|>d<|end|>",
    ),
    "an empty answer": (
        chat(("user", "hi"), ("assistant", "")),
        "<|user|>hi<|end|>\n<|assistant|><|end|>",
        "<|end|>",
    ),
    "prompt and completion": ({"prompt": "2+2=", "completion": "4"}, "2+2=4<|end|>", "4<|end|>"),
}


@pytest.mark.parametrize("name", CHATS)
def test_the_loss_counts_the_answer_and_its_end_token_only(name, tokenizer):
    row, text, targets = CHATS[name]
    (example,) = tokenize_rows([row], tokenizer, 100, "truncate").examples
    assert parts(example, tokenizer) == (text, targets)


def test_the_prompt_has_the_tokens_that_an_engine_will_send(tokenizer):
    (example,) = tokenize_rows([CHATS["one turn"][0]], tokenizer, 100, "truncate").examples
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(example.tokens[: len(prompt)]) == prompt
    assert not any(example.is_target[: len(prompt)])
    assert all(example.is_target[len(prompt) :])


def test_overlong_rows_are_cut_or_dropped_and_counted(tokenizer):
    short, cut, hopeless = (
        {"prompt": "a" * prompt, "completion": "b" * completion}
        for prompt, completion in ((2, 2), (2, 50), (50, 2))
    )
    data = tokenize_rows([short, cut, hopeless], tokenizer, 10, "truncate")
    assert (len(data.examples), data.num_truncated, data.num_dropped) == (2, 1, 1)
    assert parts(data.examples[1], tokenizer) == ("aa" + "b" * 8, "b" * 8)
    assert data.num_target_tokens == 3 + 8
    data = tokenize_rows([short, cut, hopeless], tokenizer, 10, "drop")
    assert (len(data.examples), data.num_truncated, data.num_dropped) == (1, 0, 2)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, monkeypatch):
    last_turn_only = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", last_turn_only)
    with pytest.raises(DataError, match="rewrites earlier turns"):
        tokenize_rows([CHATS["one turn"][0]], tokenizer, 100, "truncate")


def test_a_tokenizer_without_a_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="has no chat template; give rows of 'prompt' and 'completion'"):
        tokenize_rows([CHATS["one turn"][0]], tokenizer, 100, "truncate")


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="names no end token"):
        tokenize_rows([CHATS["one turn"][0]], tokenizer, 100, "truncate")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_holds_each_row_once(lengths, batch_rows, seed):
    batches = plan_batches(lengths, batch_rows, seed, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_rows), "the loop counts its steps by this"
    assert batches == plan_batches(lengths, batch_rows, seed, epoch=0)


def test_batches_waste_little_padding_and_come_in_another_order_each_epoch():
    lengths = [20 + (37 * row) % 100 for row in range(256)]
    batches = plan_batches(lengths, 8, seed=0, epoch=0)

    def padded(batches):
        return sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)

    in_file_order = [list(range(start, start + 8)) for start in range(0, 256, 8)]
    assert padded(in_file_order) > 1.3 * sum(lengths)
    assert padded(batches) < 1.1 * sum(lengths)
    assert plan_batches(lengths, 8, seed=0, epoch=1) != batches
    assert plan_batches(lengths, 8, seed=1, epoch=0) != batches


def test_a_label_is_the_token_that_follows():
    examples = [Example((5, 6, 7, 8), (False, False, True, True)), Example((9, 3), (False, True))]
    batch = make_batch(examples, pad_token=0, device=torch.device("cpu"))
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 3, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    x = IGNORED
    assert batch.labels.tolist() == [[x, 7, 8, x], [3, x, x, x]]
    assert batch.num_targets == 3
