"""`manylora inspect` on a tiny model: what it prints, as tables and as JSON, and how it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manylora.cli.app import app
from manylora.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, RequestError
from manylora.lora.formats import load_peft, save_peft
from manylora.models.tiny import save_tiny, tiny_adapter, tiny_config

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("inspect")
    save_tiny(folder / "model", CONFIG)
    for seed, name in enumerate(("mild", "team/other")):
        save_peft(
            tiny_adapter(CONFIG, rank=3 + seed, seed=seed, name=name),
            folder / "adapters" / name,
            "tiny-llama",
        )
    save_peft(tiny_adapter(tiny_config(hidden_size=32)), folder / "adapters" / "foreign")
    return folder


def run(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(
        app, ["inspect", *map(str, arguments)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_one_adapter_by_path(root):
    output = run(root / "adapters" / "mild")
    for expected in ("tiny-llama", "14 sites, rank 3", "float32", "r 3, lora_alpha 1", "gate_proj"):
        assert expected in output


def test_one_adapter_as_json(root):
    facts = json.loads(run("team/other", "--adapters", root / "adapters", "--json"))
    adapter = load_peft(root / "adapters" / "team" / "other")
    assert facts["identity"] == adapter.identity
    assert facts["num_bytes"] == adapter.num_bytes
    sites = {site["site"]: site for site in facts["sites"]}
    assert sites.keys() == adapter.sites.keys()
    for name, pair in adapter.sites.items():
        assert sites[name]["norm"] == pytest.approx(float(pair.delta().norm()))
        assert (sites[name]["rank"], sites[name]["scaling"]) == (pair.rank, pytest.approx(pair.scaling))


def test_one_adapter_with_a_weight_is_a_mixture(root):
    norms = {}
    for weight in ("mild", "mild:1", "mild:1.0", "mild:2", "mild:-0.5"):
        norms[weight] = json.loads(run(weight, "--adapters", root / "adapters", "--json"))["norm"]
    assert norms["mild"] > 0
    assert norms["mild"] == norms["mild:1"] == norms["mild:1.0"]
    assert norms["mild:2"] == pytest.approx(2 * norms["mild"])
    assert norms["mild:-0.5"] == pytest.approx(0.5 * norms["mild"])
    assert "mild:2" in run("mild:2", "--adapters", root / "adapters")


def test_a_mixture_without_a_base_has_no_verdict(root):
    output = run("mild:0.5", "team/other", "--adapters", root / "adapters")
    assert "mild:0.5+team/other:1" in output
    assert "mild, team/other" in output
    assert "No verdict" in output
    facts = json.loads(run("mild:0.5", "team/other", "--adapters", root / "adapters", "--json"))
    assert facts["probes"] is facts["verdict"] is facts["relative_norm"] is None
    assert len(facts["sites"]) == 14


def test_a_mixture_on_its_base(root):
    arguments = ("--base", root / "model", "--adapters", root / "adapters", "mild:0.01", "team/other:0.01")
    output = run(*arguments, "--top", 3)
    for expected in ("Verdict: fine", "of 14", "mild:0.01 alone", "non-additivity", "broken above"):
        assert expected in output
    assert output.count("model.layers.") == 3
    facts = json.loads(run(*arguments, "--json"))
    assert facts["verdict"]["level"] == "fine"
    assert 0 < facts["probes"]["mixture"]["kl"] < 0.1
    assert 0 < facts["relative_norm"] < 0.01
    assert len(facts["probes"]["parts"]) == 2


def test_what_is_not_finite_is_null_in_json(root):
    facts = json.loads(
        run("--base", root / "model", "--adapters", root / "adapters", "mild:1e38", "--json")
    )
    assert facts["verdict"]["level"] == "broken"
    assert facts["probes"]["mixture"]["kl"] is None


def test_own_probe_texts(root, tmp_path):
    texts = tmp_path / "texts"
    texts.write_text("ab\n\nabcd\n")
    facts = json.loads(
        run("--base", root / "model", "--adapters", root / "adapters", "mild", "--probes", texts, "--json")
    )
    assert facts["probes"]["num_positions"] == 6  # the tiny tokenizer's tokens are bytes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nowhere"], AdapterNotFoundError, "'nowhere' is no folder.*--adapters"),
        (["--adapters", "{root}/adapters", "milt"], AdapterNotFoundError, "mild"),
        (["--adapters", "{root}/adapters", "mild:x"], RequestError, "'x' after 'mild:' is no number"),
        (["--adapters", "{root}/adapters", "mild", "mild"], RequestError, "'mild' twice"),
        (["--adapters", "{root}/adapters", "mild:0"], ConfigError, "every weight is 0"),
        (["--adapters", "{root}/adapters", "mild", "--probes", "x"], ConfigError, "give --base too"),
        (["--adapters", "{root}/adapters", "mild", "foreign"], AdapterMismatchError, "different models"),
        (
            ["--base", "{root}/model", "--adapters", "{root}/adapters", "foreign"],
            AdapterMismatchError,
            "another size",
        ),
        (
            ["--base", "{root}/model", "--adapters", "{root}/adapters", "mild", "--probes", "{root}/none"],
            ConfigError,
            "cannot read the probe texts",
        ),
    ],
)
def test_errors_say_what_is_wrong(root, arguments, error, message):
    filled = [argument.format(root=root) for argument in arguments]
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, ["inspect", *filled], catch_exceptions=False)
