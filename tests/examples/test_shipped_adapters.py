"""The four adapters in examples/adapters: sound, small, made from the data that the scripts make."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manylora.lora.formats import load_peft
from manylora.train.text_rows import content_hash, read_rows

FOLDER = Path(__file__).parents[2] / "examples" / "adapters"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
RECIPES = {
    "json": (4, ATTENTION | {"gate_proj", "up_proj", "down_proj"}),
    "pirate": (8, ATTENTION),
    "sql": (4, ATTENTION),
    "headline": (4, {"q_proj", "v_proj"}),
}


def record_of(name):
    return json.loads((FOLDER / name / "training.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_an_adapter_is_what_the_readme_says(name):
    adapter = load_peft(FOLDER / name)
    rank, targets = RECIPES[name]
    assert set(adapter.ranks.values()) == {rank}
    assert {site.rpartition(".")[2] for site in adapter.sites} == targets
    assert len(adapter.sites) == 30 * len(targets)
    assert adapter.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert all(pair.delta().norm() > 0.01 for pair in adapter.sites.values())
    record = record_of(name)
    assert record["eval_loss_after"] < 0.6 * record["eval_loss_before"]
    row = next(
        line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`")
    )
    size = (FOLDER / name / "adapter_model.safetensors").stat().st_size
    assert f"{record['eval_loss_before']:.2f} → {record['eval_loss_after']:.2f}" in row
    assert f"{size / 1e6:.2f} MB" in row


def test_together_they_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*/adapter_model.safetensors")) <= 6e6


def test_they_were_trained_on_the_data_that_the_script_makes(tmp_path):
    subprocess.run([sys.executable, FOLDER / "make_data.py", tmp_path], check=True, capture_output=True)
    for name in RECIPES:
        record = record_of(name)
        assert record["data_hash"] == content_hash(read_rows(tmp_path / f"{name}.train.jsonl"))
        assert record["eval_hash"] == content_hash(read_rows(tmp_path / f"{name}.eval.jsonl"))
