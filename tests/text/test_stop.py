"""StopStrings: nothing of a stop string is shown, whatever the pieces. StopChecker: which end comes first."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import RequestError
from manylora.lifecycle import FinishReason
from manylora.text.detokenize import UNFINISHED, Detokenizer
from manylora.text.params import SamplingParams
from manylora.text.stop import StopChecker, StopUpdate
from manylora.text.stop_strings import StopStrings
from tests.text.tokenizers_for_tests import byte_level

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH

# Few letters, so that strings overlap with themselves and with each other.
STRINGS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


def cut_slowly(text: str, strings: list[str], include: bool) -> tuple[str, str | None]:
    """What StopStrings must show in the end, by looking at every beginning of the text."""
    for end in range(1, len(text) + 1):
        completed = [string for string in strings if text[:end].endswith(string)]
        if completed:
            matched = max(completed, key=len)
            return text[: end if include else end - len(matched)], matched
    return text, None


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


@given(
    text=st.text("abc", max_size=30),
    cuts=st.lists(st.integers(0, 100), max_size=12),
    strings=STRINGS,
    include=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_any_pieces_are_cut_at_the_first_stop_string(text, cuts, strings, include):
    want, matched = cut_slowly(text, strings, include)
    stream, shown = StopStrings(strings, include=include), ""
    for end, piece in enumerate(pieces := in_pieces(text, cuts), start=1):
        shown += stream.feed(piece)
        assert want.startswith(shown)
        if stream.matched is None:
            so_far = "".join(pieces[:end])
            begun = [
                string[:n] for string in strings for n in range(len(string)) if so_far.endswith(string[:n])
            ]
            # Held back is what may begin a stop string, and no more.
            assert shown == so_far[: len(so_far) - len(max(begun, key=len, default=""))]
        else:
            break
    assert shown + stream.finish() == want
    assert stream.matched == matched


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_stop_string_split_at_every_position(start, size):
    text = "x" * start + "STOP here"
    stream, shown = StopStrings(["STOP"]), []
    for at in range(0, len(text), size):
        shown.append(stream.feed(text[at : at + size]))
        if stream.matched:
            break
    assert "".join(shown) == "x" * start
    assert stream.matched == "STOP"


def test_what_only_looked_like_a_stop_string_is_shown():
    stream = StopStrings(["\n\nUser:"])
    assert [stream.feed(piece) for piece in ("Hi", "\n", "\nUs", "ed")] == ["Hi", "", "", "\n\nUsed"]
    assert stream.feed("\n\n") == ""
    assert stream.finish() == "\n\n"
    assert stream.matched is None


def test_a_stop_string_within_the_beginning_of_another():
    # "b" is complete before "abc" can be; the "a" was held back for "abc", and belongs to the text.
    stream = StopStrings(["abc", "b"])
    assert [stream.feed("xa"), stream.feed("bc")] == ["x", "a"]
    assert stream.matched == "b"


def test_strings_completed_together_cut_at_the_longest():
    stream = StopStrings(["b", "aab", "ab"])
    assert stream.feed("caab") == "c"
    assert stream.matched == "aab"


def test_passed_over_stop_strings_stay_in_the_text():
    stream = StopStrings(["ab"])
    assert stream.feed("xab", may_stop=False) == "xab"
    assert stream.feed("a", may_stop=False) == ""
    assert stream.feed("b!") == ""
    assert stream.matched == "ab"


def test_a_passed_over_stop_string_may_begin_the_next():
    stream = StopStrings(["abab"])
    assert stream.feed("abab", may_stop=False) == "ab"  # its end may begin another
    assert stream.feed("ab") == ""
    assert stream.matched == "abab"


def test_a_long_stop_string_costs_no_more_per_character():
    # Comparing the text's end with each beginning of the string would be 10^10 steps.
    string = "a" * 100_000 + "b"
    stream = StopStrings([string])
    assert stream.feed("a" * 150_000) == "a" * 50_000
    assert stream.feed("b") == ""
    assert stream.matched == string


# StopChecker, on a real tokenizer.


def checker(params=None, *, eos=(), max_tokens=None, **options) -> StopChecker:
    params = params or SamplingParams(**options)
    detokenizer = Detokenizer(byte_level()).start(skip_special_tokens=params.skip_special_tokens)
    return StopChecker(params, eos_token_ids=eos, max_tokens=max_tokens, detokenizer=detokenizer)


def ids_of(text: str) -> list[int]:
    return byte_level().encode(text).ids


def id_of(token: str) -> int:
    (token_id,) = ids_of(token)
    return token_id


EOS = id_of("<|end|>")


def run(stop: StopChecker, token_ids: list[int]) -> tuple[str, StopUpdate, int]:
    """Push tokens until the end: the text, the last update, how many tokens were taken."""
    text = ""
    for count, token_id in enumerate(token_ids, start=1):
        update = stop.push(token_id)
        text += update.text
        if update.finish_reason is not None:
            return text, update, count
    return text, update, len(token_ids)


def test_goes_on_without_a_reason():
    text, update, count = run(checker(), ids_of("the dog"))
    assert (text, update.finish_reason, update.matched, count) == (
        "the dog",
        None,
        None,
        len(ids_of("the dog")),
    )


def test_end_of_text_ends_and_is_not_shown():
    token_ids = [*ids_of("the dog"), EOS, *ids_of("fox")]
    text, update, count = run(checker(eos=[EOS], skip_special_tokens=False), token_ids)
    assert (text, update.finish_reason, update.matched) == ("the dog", STOP, EOS)
    assert count == len(ids_of("the dog")) + 1
    shown = checker(eos=[EOS], skip_special_tokens=False, include_stop_str_in_output=True)
    assert run(shown, token_ids)[0] == "the dog<|end|>"


def test_ignore_eos_leaves_stop_tokens():
    token_ids = [*ids_of("the"), EOS, *ids_of(" dog")]
    assert run(checker(eos=[EOS]), token_ids)[1].finish_reason is STOP
    assert run(checker(eos=[EOS], ignore_eos=True), token_ids)[0] == "the dog"
    both = run(checker(eos=[EOS], ignore_eos=True, stop_token_ids=[EOS]), token_ids)
    assert both[1] == StopUpdate("", STOP, EOS)


def test_a_stop_token_that_has_text():
    token_ids = ids_of("the!dog")
    assert id_of("!") in token_ids
    text, update, _ = run(checker(stop_token_ids=[id_of("!")]), token_ids)
    assert (text, update.matched) == ("the", id_of("!"))
    included = checker(stop_token_ids=[id_of("!")], include_stop_str_in_output=True)
    assert run(included, token_ids)[0] == "the!"


def test_max_tokens_ends_with_length():
    token_ids = ids_of("the dog the fox")
    text, update, count = run(checker(max_tokens=3), token_ids)
    assert (update.finish_reason, update.matched, count) == (LENGTH, None, 3)
    assert text == byte_level().decode(token_ids[:3])
    assert run(checker(SamplingParams(max_tokens=2)), token_ids)[2] == 2
    assert run(checker(SamplingParams(max_tokens=9), max_tokens=2), token_ids)[2] == 2


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(include):
    token_ids = ids_of("the dog sleeps. The fox")
    stop = checker(stop=["ps. T"], include_stop_str_in_output=include)
    text, update, count = run(stop, token_ids)
    assert text == ("the dog sleeps. T" if include else "the dog slee")
    assert (update.finish_reason, update.matched) == (STOP, "ps. T")
    assert count < len(token_ids)


def test_held_back_text_comes_with_the_end():
    token_ids = ids_of("the dog\n\n")
    stop = ["\n\nUser"]
    assert run(checker(stop=stop), token_ids)[0] == "the dog"
    assert run(checker(stop=stop), token_ids)[1].text == ""
    assert run(checker(stop=stop, max_tokens=len(token_ids)), token_ids)[0] == "the dog\n\n"
    assert run(checker(stop=stop, eos=[EOS]), [*token_ids, EOS])[0] == "the dog\n\n"
    cancelled = checker(stop=stop)
    assert run(cancelled, token_ids)[0] + cancelled.flush() == "the dog\n\n"
    assert cancelled.flush() == ""


def test_half_a_character_comes_with_the_end():
    token_ids = ids_of("a𐍈")[:-1]
    assert len(token_ids) > 2
    assert run(checker(), token_ids)[0] == "a"
    text, update, _ = run(checker(max_tokens=len(token_ids)), token_ids)
    assert (text, update.finish_reason) == ("a" + UNFINISHED, LENGTH)
    # What the end brings to light may itself be a stop string.
    text, update, _ = run(checker(max_tokens=len(token_ids), stop=[UNFINISHED]), token_ids)
    assert (text, update.finish_reason, update.matched) == ("a", STOP, UNFINISHED)


def test_a_stop_string_with_the_last_allowed_token_is_a_stop():
    token_ids = ids_of("the dog!")
    text, update, _ = run(checker(stop="!", max_tokens=len(token_ids)), token_ids)
    assert (text, update.finish_reason, update.matched) == ("the dog", STOP, "!")
    assert run(checker(eos=[EOS], max_tokens=1), [EOS])[1].finish_reason is STOP


def test_min_tokens_bans_stop_tokens_and_passes_over_stop_strings():
    bang = id_of("!")
    stop = checker(eos=[EOS], stop_token_ids=[bang], stop="a", min_tokens=2)
    assert set(stop.banned_token_ids) == {EOS, bang}
    assert stop.push(id_of("a")) == StopUpdate("a")
    assert set(stop.banned_token_ids) == {EOS, bang}
    assert stop.push(id_of("b")) == StopUpdate("b")
    assert len(stop.banned_token_ids) == 0
    assert stop.push(id_of("a")) == StopUpdate("", STOP, "a")


def test_a_stop_token_before_min_tokens_does_not_end():
    # Sampling does not choose it; a caller that pushes it all the same gets what it asked for.
    stop = checker(eos=[EOS], min_tokens=1)
    assert stop.push(EOS) == StopUpdate("")
    assert stop.push(EOS) == StopUpdate("", STOP, EOS)


def test_a_stop_string_completed_by_the_min_tokens_th_token_counts():
    stop = checker(stop="ab", min_tokens=2)
    assert stop.push(id_of("a")) == StopUpdate("")
    assert stop.push(id_of("b")) == StopUpdate("", STOP, "ab")


def test_ignored_eos_is_not_banned():
    assert checker(eos=[EOS], min_tokens=2, ignore_eos=True).banned_token_ids == ()
    assert checker(eos=[EOS]).banned_token_ids == ()


def test_no_tokenizer_gives_no_text_but_ends():
    stop = StopChecker(SamplingParams(max_tokens=3), eos_token_ids=[7])
    assert [stop.push(token_id) for token_id in (1, 2, 3)] == [
        StopUpdate(""),
        StopUpdate(""),
        StopUpdate("", LENGTH),
    ]
    assert StopChecker(SamplingParams(), eos_token_ids=[7]).push(7) == StopUpdate("", STOP, 7)
    assert stop.flush() == ""


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(RequestError, match=r"stop strings \['END'\] need a tokenizer.*use stop_token_ids"):
        StopChecker(SamplingParams(stop="END"))


@given(
    data=st.data(), stop=st.lists(st.sampled_from(["the", "og", " ", "😀", "\n", "x d", "e"]), max_size=2)
)
@settings(deadline=None, max_examples=100)
def test_shown_text_is_the_text_of_the_tokens_cut(data, stop):
    vocabulary = [*ids_of("the dog 😀 fox\n"), EOS]
    token_ids = data.draw(st.lists(st.sampled_from(vocabulary), min_size=1, max_size=25))
    text, update, count = run(checker(eos=[EOS], stop=stop, max_tokens=20), token_ids)
    whole = byte_level().decode(token_ids[:count])
    want, matched = cut_slowly(whole, stop, include=False)
    assert want.startswith(text)
    if update.finish_reason is not None:
        assert text == want
        assert update.finish_reason is (LENGTH if matched is None and token_ids[count - 1] != EOS else STOP)
