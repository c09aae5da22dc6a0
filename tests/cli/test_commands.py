"""Commands on the tiny model, through the same door as a user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from manylora.cli import main
from manylora.cli.app import app
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.convert import load_adapter
from manylora.lora.formats import load_peft, save_peft
from manylora.models.tiny import save_tiny, tiny_adapter, tiny_config

run = CliRunner().invoke


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("alice", "bob"), 1):
        save_peft(tiny_adapter(tiny_config(), seed=seed, dtype=torch.bfloat16), folder / name)
    return folder


def complete(base: Path, adapters: Path, *options: str) -> list[dict[str, object]]:
    fixed = (
        "--adapters",
        str(adapters),
        "--json",
        "--temperature",
        "0",
        "--max-tokens",
        "6",
        "--ignore-eos",
    )
    result = run(app, ["complete", str(base), *options, *fixed])
    assert result.exit_code in (0, 1), result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_complete_runs_the_mixture(base: Path, adapters: Path) -> None:
    (plain,) = complete(base, adapters, "hello")
    (mixed,) = complete(base, adapters, "hello", "--lora", "alice:1+bob:-0.5")
    assert plain["text"] != mixed["text"]
    assert (plain["finish_reason"], mixed["num_tokens"]) == ("length", 6)


def test_complete_reads_a_file_with_a_mixture_per_line(base: Path, adapters: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    rows = [
        {"prompt": "hello"},
        {"prompt": "hello", "lora": {"alice": 1.0, "bob": -0.5}},
        {"messages": [{"role": "user", "content": "hello"}], "lora": "alice", "max_tokens": 3},
        {"prompt": "hello", "lora": "nobody"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    base_row, mixed, short, refused = complete(base, adapters, "--file", str(file))
    assert base_row["text"] == complete(base, adapters, "hello")[0]["text"]
    assert mixed["text"] == complete(base, adapters, "hello", "--lora", "alice:1+bob:-0.5")[0]["text"]
    assert (short["num_tokens"], short["error"]) == (3, None)
    assert "nobody" in str(refused["error"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ('{"prompt": "a", "frobnicate": 1}', "frobnicate"),
        ('{"lora": "alice"}', "expected an object"),
    ],
)
def test_a_malformed_line_is_named(base: Path, tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    result = run(app, ["complete", str(base), "--file", str(file)])
    assert "line 2" in str(result.exception)
    assert says in str(result.exception)


def test_compose_writes_what_the_mixture_is(adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "both"
    result = run(app, ["compose", "alice:1.0+bob:0.5", str(out), "--adapters", str(adapters)])
    assert result.exit_code == 0, result.output
    parts, site = [load_peft(adapters / name) for name in ("alice", "bob")], "model.layers.0.mlp.up_proj"
    wanted = parts[0].sites[site].delta() + 0.5 * parts[1].sites[site].delta()
    torch.testing.assert_close(load_peft(out).sites[site].delta(), wanted)


def test_compose_refuses_an_option_that_its_method_does_not_use(adapters: Path, tmp_path: Path) -> None:
    result = run(app, ["compose", "alice", str(tmp_path / "x"), "--adapters", str(adapters), "--rank", "2"])
    assert "does not use rank" in str(result.exception)
    assert not (tmp_path / "x").exists()


def test_convert_changes_an_adapters_dtype(adapters: Path, tmp_path: Path) -> None:
    result = run(app, ["convert", str(adapters / "alice"), str(tmp_path / "wide"), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    before, after = load_peft(adapters / "alice"), load_peft(tmp_path / "wide")
    assert (before.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    for site, pair in before.sites.items():
        assert torch.equal(pair.delta(), after.sites[site].delta())


def test_convert_writes_an_adapter_in_every_format_and_back(tmp_path: Path) -> None:
    pair = LoraPair(torch.randn(2, 4), torch.randn(6, 2), 1.5)
    adapter = Adapter({"down_blocks.1.attentions.0.proj_in": pair})
    save_peft(adapter, tmp_path / "peft")
    steps = [
        ("peft", "k.safetensors", ["--format", "kohya", "--layout", "sdxl"]),
        ("k.safetensors", "diffusers", ["--format", "diffusers"]),
        ("diffusers", "again", []),
    ]
    for source, out, options in steps:
        result = run(app, ["convert", str(tmp_path / source), str(tmp_path / out), *options])
        assert result.exit_code == 0, result.output
        assert load_adapter(tmp_path / out).identity == adapter.identity
    assert load_peft(tmp_path / "again").identity == adapter.identity
    result = run(app, ["inspect", str(tmp_path / "k.safetensors"), "--json"])
    assert json.loads(result.stdout)["identity"] == adapter.identity


def test_convert_refuses_what_it_would_ignore(adapters: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "x.safetensors")
    for source, options, says in (
        (adapters / "alice", ["--layout", "sd"], "--layout is for --format kohya"),
        (adapters / "alice", ["--format", "kohya", "--layout", "sd"], "no name in kohya's files"),
        ("no-model", ["--format", "kohya"], "--format is for adapters"),
    ):
        result = run(app, ["convert", str(source), out, *options])
        assert says in str(result.exception)
    assert not Path(out).exists()


def test_an_error_is_one_message_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["manylora", "complete", "no-such-model", "hello"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("ModelError: no model 'no-such-model'")
    assert "Traceback" not in message


def test_every_option_explains_itself() -> None:
    for command in (
        ["complete"],
        ["train", "text"],
        ["train", "image"],
        ["distill"],
        ["generate"],
        ["bench", "text"],
        ["bench", "kernels"],
        ["bench", "steps"],
        ["bench", "first-token"],
        ["bench", "serve"],
        ["serve"],
        ["bench", "image"],
        ["compose"],
        ["convert"],
        ["inspect"],
        ["demo"],
    ):
        result = run(app, [*command, "--help"], env={"COLUMNS": "400"})
        assert result.exit_code == 0
        options = [line for line in result.stdout.splitlines() if "--" in line and "│" in line]
        assert options
        for line in options:
            assert len(line.split("│")[1].split(">", 1)[-1].strip()) > 10, f"no help: {line}"
