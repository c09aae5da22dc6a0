"""Commands on the tiny model, through the same door as a user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from manylora.cli import main
from manylora.cli.app import app
from manylora.errors import ConfigError, DataError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.convert import load_adapter, save_adapter
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
    return [json.loads(line) for line in result.stdout.split("\n") if line]


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
        ('{"prompt": "a", "temperature": -1}', "temperature"),
        ('{"prompt": 5}', '"prompt" must be a text, got 5'),
        ('{"messages": []}', '"messages" must be a list of objects, one at least, got []'),
        ('{"messages": ["hi"]}', "one at least, got ['hi']"),
        ('{"prompt": "\\ud83d"}', "not JSON"),
    ],
)
def test_a_malformed_line_is_named(base: Path, tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    result = run(app, ["complete", str(base), "--file", str(file)])
    assert "line 2" in str(result.exception)
    assert says in str(result.exception)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no request"),
        (b"\n \n", "holds no request"),
        ('{"prompt": "é"}'.encode("latin-1"), "'utf-8'"),
    ],
)
def test_a_file_without_requests_is_refused_before_the_model_is_loaded(
    tmp_path: Path, content: bytes, says: str
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(content)
    result = run(app, ["complete", "no-such-model", "--file", str(file)])
    assert isinstance(result.exception, ConfigError | DataError)
    assert str(file) in str(result.exception)
    assert says in str(result.exception)


def test_only_a_line_feed_ends_a_row(base: Path, adapters: Path, tmp_path: Path) -> None:
    """The other ends of lines that Python knows may stand in a JSON text, as `--json` writes them."""
    asked = ["a\u2028b", "a\u2029b", "a\x85b"]
    file = tmp_path / "requests.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in asked), encoding="utf-8"
    )
    answers = complete(base, adapters, "--file", str(file))
    assert [answer["prompt"] for answer in answers] == asked
    assert [answer["error"] for answer in answers] == [None] * 3


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_row_that_cannot_be_asked_costs_no_other_answer(
    base: Path, tmp_path: Path, form: list[str]
) -> None:
    file = tmp_path / "requests.jsonl"
    rows = [{"messages": [{"role": "user"}]}, {"prompt": ""}, {"prompt": "hello", "lora": None}]
    file.write_text("\n".join(map(json.dumps, rows)))
    result = run(
        app, ["complete", str(base), "--file", str(file), "--max-tokens", "3", "--ignore-eos", *form]
    )
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout.count("chat template refuses the prompt") == 1
    if form:
        assert [json.loads(line)["num_tokens"] for line in result.stdout.splitlines()] == [0, 3, 3]


def test_a_model_without_a_chat_template_takes_raw_prompts(adapters: Path, tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    (refused,) = complete(bare, adapters, "hello")
    assert "no chat template" in str(refused["error"])
    assert "--raw" in str(refused["error"])
    (answered,) = complete(bare, adapters, "hello", "--raw")
    assert (answered["error"], answered["num_tokens"]) == (None, 6)


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


@pytest.mark.parametrize(
    ("second", "wanted"), [("one/base", "one/base"), ("other/base", None), (None, None)]
)
def test_compose_names_the_base_model_that_all_are_for(
    tmp_path: Path, second: str | None, wanted: str | None
) -> None:
    for seed, (name, base_model) in enumerate((("alice", "one/base"), ("bob", second)), 1):
        save_peft(tiny_adapter(tiny_config(), seed=seed), tmp_path / name, base_model)
    result = run(app, ["compose", "alice+bob:0.5", str(tmp_path / "both"), "--adapters", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert load_peft(tmp_path / "both").base_model == wanted


WRITES = {
    "compose": (["compose", "alice", "{out}", "--adapters", "{adapters}"], ""),
    "convert": (["convert", "{adapters}/alice", "{out}", "--dtype", "float32"], ""),
    "convert to diffusers": (
        ["convert", "{adapters}/unet", "{out}", "--format", "diffusers"],
        ".safetensors",
    ),
    "convert to kohya": (
        ["convert", "{adapters}/unet", "{out}", "--format", "kohya", "--layout", "sd"],
        ".safetensors",
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_where_an_adapter_cannot_be_written_is_one_message(
    adapters: Path, tmp_path: Path, name: str
) -> None:
    pair = LoraPair(torch.ones(2, 4), torch.ones(6, 2), 1.0)
    save_peft(Adapter({"down_blocks.1.attentions.0.proj_in": pair}), tmp_path / "unet")
    save_peft(load_peft(adapters / "alice"), tmp_path / "alice")
    (tmp_path / "file").write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    template, suffix = WRITES[name]
    below = tmp_path / "file" / "below" / f"both{suffix}"
    for out, says in (
        (below, f"cannot write '{below}': Not a directory"),
        (tmp_path / "file", f"'{tmp_path}/file'"),
    ):
        result = run(app, [part.format(out=out, adapters=tmp_path) for part in template])
        assert isinstance(result.exception, ConfigError), result.exception
        assert says in str(result.exception)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_file_that_is_converted_is_not_overwritten_by_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    pair = LoraPair(torch.ones(2, 4), torch.ones(6, 2), 1.0)
    save_adapter(Adapter({"down_blocks.1.attentions.0.proj_in": pair}), file, "diffusers")
    for out in (file, tmp_path / "b.safetensors"):
        result = run(app, ["convert", str(file), str(out), "--dtype", "float16"])
        assert isinstance(result.exception, ConfigError), result.exception
        assert f"PEFT's format is a folder, not the file '{out}'" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    result = run(
        app, ["convert", str(file), str(file), "--dtype", "float16", "--format", "kohya", "--layout", "sd"]
    )
    assert result.exit_code == 0, result.output
    assert load_adapter(file).dtype == torch.float16


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
