import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import DataError
from manylora.train.text_rows import content_hash, read_rows, split_rows

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
PAIR = {"prompt": "hi", "completion": "ho"}


def test_both_kinds_of_row_are_read_and_blank_lines_are_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n\n{json.dumps(PAIR)}\n")
    assert read_rows(path) == [CHAT, PAIR]


def test_only_a_line_feed_ends_a_row(tmp_path):
    """The other ends of lines that Python knows may stand in a JSON text."""
    rows = [{"prompt": f"a{end}b", "completion": "x"} for end in ("\u2028", "\u2029", "\x85")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_rows(path) == rows


def chat(*messages):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "hi"}', r"expected the keys \['messages'\] or .*got \['text'\]"),
        ('{"prompt": "hi"}', r"got \['prompt'\]"),
        ('{"prompt": "hi", "completion": ""}', "'completion' must be a text that is not empty, got ''"),
        ('{"prompt": 3, "completion": "ho"}', "'prompt' must be a text that is not empty, got 3"),
        ('{"messages": []}', "'messages' must be a list that is not empty"),
        ('{"messages": [{"role": "user"}]}', "message 0 must have exactly 'role' and 'content'"),
        (chat(("user", "hi"), ("robot", "ho")), "message 1 has the role 'robot'; known:"),
        (chat(("user", None), ("assistant", "ho")), "message 0 has content of type NoneType"),
        (chat(("user", "hi")), "end with the assistant's answer"),
        (
            chat(("assistant", "hi"), ("user", "hi"), ("assistant", "ho")),
            "must begin with a user or system message",
        ),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3: .*{problem}"):
        read_rows(path)


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        read_rows(path)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 12), min_size=5, max_size=40), st.integers(0, 5), st.floats(0.05, 0.5))
def test_equal_rows_never_stand_on_both_sides(numbers, seed, fraction):
    rows = [{"prompt": str(number), "completion": "x"} for number in numbers]
    if len(set(numbers)) < 3:
        return
    training, held_out = split_rows(rows, fraction, seed)
    assert len(training) + len(held_out) == len(rows)
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held_out}
    assert training
    assert held_out
    assert split_rows(rows, fraction, seed) == (training, held_out)


def test_another_seed_holds_out_other_rows():
    rows = [{"prompt": str(number), "completion": "x"} for number in range(100)]
    assert split_rows(rows, 0.2, seed=0)[1] != split_rows(rows, 0.2, seed=1)[1]
    assert len(split_rows(rows, 0.2, seed=0)[1]) == 20


def test_too_few_rows_to_hold_any_out():
    with pytest.raises(DataError, match="1 different rows are too few to hold 50% of them out"):
        split_rows([PAIR, PAIR], 0.5, seed=0)


def test_the_hash_is_of_the_content():
    assert content_hash([PAIR, CHAT]) == content_hash([dict(reversed(PAIR.items())), CHAT])
    assert content_hash([PAIR, CHAT]) != content_hash([CHAT, PAIR])
    assert content_hash([PAIR]) != content_hash([PAIR, PAIR])
