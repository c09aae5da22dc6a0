import json

import pytest

from tests.train.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """Questions of several lengths whose answer is always the same."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": "ab" * (1 + n % 7) + str(n)},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
