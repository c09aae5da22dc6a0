"""Write the training and held-out rows of the four example adapters: python make_data.py FOLDER [--seed 0].

Everything is synthetic: templates and word lists written for this project, in tasks/. Held-out rows ask about other
things (tables, countries, questions, events) than the training rows do, not only in other words.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from tasks import headline, json_answers, pirate, sql

MakeRow = Callable[[random.Random, bool], tuple[str, str]]

# Task, its rows, and how many of them are trained on.
TASKS: dict[str, tuple[MakeRow, int]] = {
    "json": (json_answers.row, 440),
    "pirate": (pirate.row, 400),
    "sql": (sql.row, 480),
    "headline": (headline.row, 320),
}
NUM_HELD_OUT = 40


def distinct_rows(
    make_row: MakeRow, rng: random.Random, count: int, held_out: bool
) -> dict[tuple[str, str], None]:
    """Draw until there are `count` different (question, answer)."""
    rows: dict[tuple[str, str], None] = {}
    while len(rows) < count:
        rows[make_row(rng, held_out)] = None
    return rows


def as_chat(question: str, answer: str) -> str:
    """Return the JSON line of a chat of one turn."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for task, (make_row, num_training) in TASKS.items():
        for split, count in (("train", num_training), ("eval", NUM_HELD_OUT)):
            rows = distinct_rows(
                make_row, random.Random(f"{task}/{split}/{options.seed}"), count, split == "eval"
            )
            path = options.folder / f"{task}.{split}.jsonl"
            path.write_text("".join(as_chat(*row) for row in rows), encoding="utf-8")
            print(f"{path}: {count} rows")


if __name__ == "__main__":
    main()
