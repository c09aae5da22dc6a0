"""The data of the example adapters is what their README says."""

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "adapters"
TASKS = ("json", "pirate", "sql", "headline")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{task: {split: [(question, answer)]}}"""
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, FOLDER / "make_data.py", folder], check=True, capture_output=True)
    return {
        task: {split: read(folder / f"{task}.{split}.jsonl") for split in ("train", "eval")}
        for task in TASKS
    }


def read(path):
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [(question["content"], answer["content"]) for question, answer in rows]


def all_rows(splits):
    return splits["train"] + splits["eval"]


def test_sizes(data):
    assert {task: [len(rows) for rows in splits.values()] for task, splits in data.items()} == {
        "json": [440, 40],
        "pirate": [400, 40],
        "sql": [480, 40],
        "headline": [320, 40],
    }


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_question_or_answer_is_trained_on(data, task):
    questions = {question for question, _ in data[task]["train"]}
    assert not [question for question, _ in data[task]["eval"] if question in questions]
    assert len({question for question, _ in data[task]["eval"]}) > 25


def test_every_json_answer_is_one_object(data):
    shapes = set()
    for _, answer in all_rows(data["json"]):
        parsed = json.loads(answer)
        assert isinstance(parsed, dict)
        shapes.add(tuple(parsed))
    assert len(shapes) > 40


def test_every_sql_answer_runs_on_the_columns_of_its_prompt(data):
    for prompt, statement in all_rows(data["sql"]):
        columns = re.search(r"\((id, [^)]*)\)|: (id, [^.]*)\.|columns (id, [^:]*):", prompt)
        table = re.search(r"FROM (\w+)", statement)
        assert columns, prompt
        assert table, statement
        assert table[1] in prompt
        with sqlite3.connect(":memory:") as database:
            database.execute(f"CREATE TABLE {table[1]} ({next(filter(None, columns.groups()))})")
            database.execute(statement)


def test_every_headline_is_one_line_shorter_than_its_paragraph(data):
    for paragraph, headline in all_rows(data["headline"]):
        assert "{" not in paragraph + headline, "a slot that was not filled"
        assert "\n" not in headline
        assert len(headline) < 0.6 * len(paragraph)


def test_every_pirate_answer_sounds_like_one(data):
    plain = re.compile(r"\b(the|you|your|and|is|are|of)\b")
    for _, answer in all_rows(data["pirate"]):
        assert not plain.search(answer), answer
    assert len({answer.split("!")[0] for _, answer in data["pirate"]["train"]}) >= 10
