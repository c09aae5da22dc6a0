"""JSONL: what a line is, and how one that holds no object is told."""

import json

import pytest

from manylora.errors import DataError
from manylora.json_lines import json_lines


def test_objects_come_with_their_place_and_blank_lines_do_not(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"a{end}b"} for end in ("\u2028", "\u2029", "\x85")]
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert list(json_lines(file)) == [
        (f"{file}, line {n}", row) for n, row in zip((1, 3, 5), rows, strict=True)
    ]


def test_a_character_written_as_two_escapes_is_one(tmp_path):
    (tmp_path / "rows").write_text('{"text": "\\ud83d\\ude00"}')
    assert [row["text"] for _, row in json_lines(tmp_path / "rows")] == ["😀"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1}\n{', "line 2: not JSON"),
        (b"\n[1]", "line 2: expected a JSON object, got list"),
        (b'{"a": "\\ud83d"}', "line 1: not JSON: .*surrogates not allowed"),
        (b"\xff", "cannot be read: .*utf-8"),
    ],
)
def test_what_holds_no_object_is_named_by_file_and_line(tmp_path, content, says):
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(DataError, match=f"rows.*{says}"):
        list(json_lines(tmp_path / "rows"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no-such\.jsonl cannot be read"):
        list(json_lines(tmp_path / "no-such.jsonl"))
