"""IncrementalDetokenizer: its pieces are the tokenizer's text, whole characters only, at a bounded cost a token."""

import os
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from manylora.errors import ConfigError
from manylora.text.detokenize import UNFINISHED, Detokenizer, IncrementalDetokenizer
from tests.text.tokenizers_for_tests import KINDS, byte_fallback, byte_level

# Texts of all planes, and often what splits: emoji, marks, scripts that the tokenizers have not seen.
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            [
                "the dog",
                "  ",
                " ",
                "\n",
                "é",
                "é",
                "😀",
                "👩‍👩‍👧",
                "日本語",
                "€",
                "𐍈",
                "�",
                "<|end|>",
                "</s>",
            ]
        ),
        max_size=20,
    ).map("".join),
)


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], **options) -> list[str]:
    """The piece of each token, and last what finish gives."""
    sequence = Detokenizer(tokenizer).start(**options)
    return [*(sequence.feed(token_id) for token_id in token_ids), sequence.finish()]


def decode(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool = True) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def text_of(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> str:
    return "".join(detokenizer.feed(token_id) for token_id in token_ids) + detokenizer.finish()


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, skip_special_tokens=st.booleans())
@settings(deadline=None, max_examples=80)
def test_pieces_of_a_text_join_to_it_and_split_no_character(kind, text, skip_special_tokens):
    tokenizer = KINDS[kind]()
    token_ids = tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, token_ids, skip_special_tokens=skip_special_tokens)
    assert "".join(pieces) == decode(tokenizer, token_ids, skip_special_tokens)
    if UNFINISHED not in text:
        assert not any(UNFINISHED in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip_special_tokens=st.booleans())
@settings(deadline=None, max_examples=150)
def test_pieces_of_any_tokens_join_to_their_text(kind, data, skip_special_tokens):
    # A model may give any tokens: broken UTF-8, special tokens anywhere, ids beyond the vocabulary.
    tokenizer = KINDS[kind]()
    size = tokenizer.get_vocab_size()
    token_ids = data.draw(st.lists(st.one_of(st.integers(0, size + 3), st.integers(0, 5)), max_size=60))
    pieces = pieces_of(tokenizer, token_ids, skip_special_tokens=skip_special_tokens)
    assert "".join(pieces) == decode(tokenizer, token_ids, skip_special_tokens)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(run=st.binary(max_size=60))
@settings(deadline=None, max_examples=150)
def test_pieces_of_any_bytes_join_to_their_text(kind, run):
    tokenizer = KINDS[kind]()
    token_ids = [byte_token(kind, byte) for byte in run] + tokenizer.encode("dog").ids
    assert "".join(pieces_of(tokenizer, token_ids)) == decode(tokenizer, token_ids)


def byte_token(kind: str, byte: int) -> int:
    if kind == "byte_fallback":
        return id_of(byte_fallback(), f"<0x{byte:02X}>")
    return id_of(byte_level(), byte_level_character(byte))


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return token_id


def byte_level_character(byte: int) -> str:
    """The character that stands for a byte in byte-level vocabularies (GPT-2)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXTS, text=TEXTS)
@settings(deadline=None, max_examples=80)
def test_context_goes_before_the_text(kind, prompt, text):
    tokenizer = KINDS[kind]()
    prompt_ids, token_ids = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    whole = decode(tokenizer, prompt_ids + token_ids)
    before = decode(tokenizer, prompt_ids)
    pieces = "".join(pieces_of(tokenizer, token_ids, context=prompt_ids))
    # A prompt that ends in U+FFFD itself looks unfinished; then that character comes with the text.
    assert before.removesuffix(UNFINISHED) + pieces == whole or before + pieces == whole


def test_context_keeps_the_space_of_the_first_word():
    tokenizer = byte_fallback()
    dog = tokenizer.encode("dog").ids
    assert "".join(pieces_of(tokenizer, dog)) == "dog"
    assert "".join(pieces_of(tokenizer, dog, context=tokenizer.encode("the").ids)) == " dog"


def test_a_character_of_several_tokens_comes_with_its_last():
    tokenizer = byte_level()
    token_ids = [byte_token("byte_level", byte) for byte in "é😀".encode()]
    assert len(token_ids) == 6
    assert pieces_of(tokenizer, token_ids) == ["", "é", "", "", "", "😀", ""]


def test_a_byte_run_comes_when_it_has_ended():
    tokenizer = byte_fallback()
    run = [byte_token("byte_fallback", byte) for byte in "😀".encode()]
    end = id_of(tokenizer, "a")
    assert pieces_of(tokenizer, [*run, end]) == ["", "", "", "", "😀a", ""]
    assert pieces_of(tokenizer, run) == ["", "", "", "", "😀"]
    # Why: one more byte makes the tokenizer show the whole run as broken.
    broken = byte_token("byte_fallback", 0xFF)
    assert pieces_of(tokenizer, [*run, broken, end])[-2] == 5 * UNFINISHED + "a"
    # A token that gives no text does not end the run.
    assert pieces_of(tokenizer, [*run[:2], id_of(tokenizer, "</s>"), *run[2:], end])[-2] == "😀a"


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_comes_at_once(kind):
    tokenizer = KINDS[kind]()
    token_ids = tokenizer.encode("the dog the fox").ids
    pieces = pieces_of(tokenizer, token_ids)
    assert pieces[-1] == ""
    joined = list(accumulate(pieces[:-1]))
    assert joined == [decode(tokenizer, token_ids[: n + 1]) for n in range(len(token_ids))]


def test_special_tokens_are_skipped_or_shown():
    tokenizer = byte_level()
    token_ids = tokenizer.encode("the<|end|> dog").ids
    assert "".join(pieces_of(tokenizer, token_ids)) == "the dog"
    assert "".join(pieces_of(tokenizer, token_ids, skip_special_tokens=False)) == "the<|end|> dog"


def test_a_space_after_a_skipped_token_is_kept():
    # The skipped token is no left neighbour: with it alone in the window, the word would lose its space.
    tokenizer = byte_fallback()
    the, dog = tokenizer.encode("the").ids, tokenizer.encode("dog").ids
    token_ids = [*the, id_of(tokenizer, "</s>"), *dog]
    assert pieces_of(tokenizer, token_ids) == ["the", "", " dog", ""]


class CountingDetokenizer(Detokenizer):
    longest = 0

    def text(self, token_ids, skip_special_tokens):
        self.longest = max(self.longest, len(token_ids))
        return super().text(token_ids, skip_special_tokens)


@pytest.mark.parametrize("byte", [0xFF, 0xE2, 0x82], ids=["never valid", "first of three", "continuation"])
def test_the_work_per_token_is_bounded(byte):
    shared = CountingDetokenizer(byte_level())
    token_ids = [byte_token("byte_level", byte)] * 500
    assert text_of(shared.start(), token_ids) == 500 * UNFINISHED
    assert 1 < shared.longest <= 16


def test_finish_gives_each_character_once():
    sequence = Detokenizer(byte_level()).start()
    assert sequence.feed(byte_token("byte_level", 0xE2)) == ""
    assert [sequence.finish(), sequence.finish()] == [UNFINISHED, ""]


def test_a_tokenizer_of_another_library_is_refused():
    with pytest.raises(ConfigError, match="tokenizer dict is not backed by the tokenizers library"):
        Detokenizer({})  # type: ignore[arg-type]


def test_a_transformers_tokenizer_is_taken():
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    token_ids = tokenizer("the dog 😀").input_ids
    assert text_of(Detokenizer(tokenizer).start(), token_ids) == "the dog 😀"


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_pieces_join_to_the_text():
    from transformers import AutoTokenizer

    folder = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "manylora/models/SmolLM2-135M-Instruct"
    )
    if not folder.exists():
        pytest.skip(f"no model in {folder}; `make model` fetches it")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")

    @given(text=TEXTS, tail=st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    @settings(deadline=None, max_examples=200)
    def check(text, tail):
        token_ids = tokenizer(text).input_ids + tail
        want = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text_of(Detokenizer(tokenizer).start(), token_ids) == want

    check()
