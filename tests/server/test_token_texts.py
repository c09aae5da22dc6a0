"""Tokens one by one: their bytes join to the text, whatever the tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from manylora.server.logprobs import LEAST, chat_logprobs, completion_logprobs
from manylora.server.messages import TokenLogprobs
from manylora.server.token_texts import TokenTexts
from tests.text.tokenizers_for_tests import LINES, byte_fallback, byte_level

KINDS = {"byte_level": (byte_level, ""), "byte_fallback": (byte_fallback, " ")}

NEVER_SEEN = "漢字 🎉 ¡olé!"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("line", [*LINES, NEVER_SEEN])
def test_the_bytes_of_tokens_join_to_the_text(kind, line):
    make, in_front = KINDS[kind]
    texts = TokenTexts(SimpleNamespace(backend_tokenizer=make()))
    tokens = make().encode(line).ids
    assert len(tokens) > 5
    assert b"".join(map(texts.bytes_of, tokens)).decode() == in_front + line
    whole = [texts.text_of(token) for token in tokens]
    if line == NEVER_SEEN:  # characters in parts
        assert any(text.startswith("bytes:\\x") for text in whole)


def test_special_tokens_and_ids_without_one():
    tokenizer = byte_level()
    texts = TokenTexts(SimpleNamespace(backend_tokenizer=tokenizer))
    end = tokenizer.token_to_id("<|end|>")
    assert end is not None
    assert texts.text_of(end) == "<|end|>"
    assert texts.text_of(tokenizer.get_vocab_size() + 5) == ""  # a vocabulary padded for speed


def test_what_no_json_can_hold_is_written_as_openai_does():
    texts = TokenTexts(SimpleNamespace(backend_tokenizer=byte_level()))
    logprobs = [TokenLogprobs(float("-inf"), ((70, -0.5), (71, -1.0)))]
    completion = completion_logprobs(texts, [72], logprobs, offset=3)
    assert completion is not None
    assert completion.token_logprobs == [LEAST]
    assert sorted(completion.top_logprobs[0].values()) == [LEAST, -1.0, -0.5]
    assert completion.text_offset == [3]
    chat = chat_logprobs(texts, [72], logprobs)
    assert chat is not None
    assert [len(chat.content[0].top_logprobs), chat.content[0].logprob] == [2, LEAST]
    assert completion_logprobs(texts, [72], ()) is None
    assert chat_logprobs(texts, [72], ()) is None
