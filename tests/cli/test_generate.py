"""`manylora generate` on a tiny base, through the same door as a user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from manylora.cli.app import app
from manylora.image.png import read_settings
from manylora.lora.convert import save_adapter
from manylora.models.diffusion_base import load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd
from tests.image.pictures import largest_difference, random_adapter

run = CliRunner().invoke


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("base") / "tiny", prediction="v_prediction")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    model = load_diffusion_base(base)
    save_adapter(random_adapter(model, 1), folder / "lcm", "peft")
    save_adapter(random_adapter(model, 2), folder / "style.safetensors", "diffusers")
    return folder


def generate(base: Path, out: Path, *options: str, exit_code: int = 0) -> list[dict[str, object]]:
    result = run(app, ["generate", str(base), *options, "--out", str(out), "--json"])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return [json.loads(line) for line in result.stdout.splitlines()]


def image_at(told: dict[str, object]) -> Image.Image:
    with Image.open(str(told["path"])) as image:
        return image.copy()


def test_a_picture_with_two_loras(base: Path, adapters: Path, tmp_path: Path) -> None:
    fixed = ("a cat", "--adapters", str(adapters), "--steps", "2", "--seed", "1")
    (mixed,) = generate(base, tmp_path, *fixed, "--lora", "lcm", "--lora", "style:0.8")
    (plain,) = generate(base, tmp_path, *fixed)
    assert (mixed["lora"], mixed["error"]) == ({"lcm": 1.0, "style": 0.8}, None)
    assert [Path(str(told["path"])).name for told in (mixed, plain)] == ["00000-1.png", "00001-1.png"]
    assert largest_difference(image_at(mixed), image_at(plain)) > 10
    settings = read_settings(Path(str(mixed["path"])))
    assert {name: mixed[name] for name in settings if name != "version"} == {
        name: value for name, value in settings.items() if name != "version"
    }


def test_loras_by_path_are_those_by_name(base: Path, adapters: Path, tmp_path: Path) -> None:
    fixed = ("a cat", "--steps", "2", "--seed", "1")
    (by_name,) = generate(
        base, tmp_path, *fixed, "--adapters", str(adapters), "--lora", "lcm", "--lora", "style:0.8"
    )
    (by_path,) = generate(
        base, tmp_path, *fixed,
        "--lora", str(adapters / "lcm"), "--lora", f"{adapters / 'style.safetensors'}:0.8",
    )  # fmt: skip
    assert by_path["lora"] == by_name["lora"]
    assert by_path["adapters"] == by_name["adapters"]
    assert largest_difference(image_at(by_name), image_at(by_path)) <= 1
    (both,) = generate(
        base,
        tmp_path,
        *fixed,
        "--adapters",
        str(adapters),
        "--lora",
        str(adapters / "lcm"),
        "--lora",
        "style:0.8",
    )
    assert both["lora"] == by_name["lora"], "a path to what a name means is that name"


def test_a_file_with_a_mixture_per_line(base: Path, adapters: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    rows = [
        {"prompt": "a cat", "lora": "lcm:1+style:0.5", "seed": 4},
        {"prompt": "a cat", "lora": ["lcm", "style:0.5"], "seed": 4},
        {"prompt": "a cat", "image": str(tmp_path / "red.png"), "strength": 0.5},
        {"prompt": "a cat", "lora": "lcm", "width": 17},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    told = generate(base, tmp_path / "out", "--file", str(file), "--adapters", str(adapters), exit_code=1)
    first, same, from_image, refused = told
    assert largest_difference(image_at(first), image_at(same)) <= 1
    assert from_image["strength"] == 0.5
    assert "multiple of 2" in str(refused["error"])
    assert refused["path"] is None


def test_a_sweep_in_one_picture(base: Path, adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    (told,) = generate(
        base, out, "a cat", "--adapters", str(adapters), "--lora", "lcm", "--lora", "style:0.8", "--seed", "1",
        "--grid", "steps=1,2,4", "--grid", "style=0,0.8",
    )  # fmt: skip
    assert told == {"path": str(out), "num_cells": 6, "num_failed": 0}
    cells = read_settings(out)["cells"]
    assert [(cell["steps"], cell["lora"].get("style", 0)) for cell in cells] == [
        (1, 0), (2, 0), (4, 0), (1, 0.8), (2, 0.8), (4, 0.8),
    ]  # fmt: skip
    with Image.open(out) as grid:
        assert grid.width > grid.height > 2 * 96


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lora", "nobody"], "no adapter 'nobody'"),
        (["--lora", "lcm:heavy"], "'heavy' after ':' is no number"),
        (["--lora", "lcm:nan"], "finite"),
        (["--lora", "lcm", "--lora", "lcm:0.5"], "twice"),
        (["--grid", "speed=1,2"], "one of the axes steps, guidance, seed, strength"),
        (["--grid", "steps=1,two"], "whole numbers"),
        (["--grid", "steps=0,1"], "at least 1"),
        (["--grid", "steps=1", "--grid", "steps=2"], "one or two different axes"),
        (["--grid", "steps=1", "--n", "2"], "one picture a cell"),
        (["--image", "no-such.png"], "cannot read the picture 'no-such.png'"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--file", "x.jsonl"], "not both"),
    ],
)
def test_what_makes_no_sense_is_refused(
    base: Path, adapters: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    fixed = ["generate", str(base), "a cat", "--adapters", str(adapters), "--out", str(tmp_path / "out")]
    result = run(app, [*fixed, *options])
    assert result.exit_code == 1
    assert says in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_malformed_line_is_named(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    for line, says in (("{", "not JSON"), ('{"prompt": "a", "cfg": 1}', "cfg"), ("[]", "an object")):
        file.write_text('{"prompt": "a"}\n' + line + "\n")
        result = run(app, ["generate", str(base), "--file", str(file)])
        assert "line 2" in str(result.exception)
        assert says in str(result.exception)


def test_an_unreadable_picture_to_start_from_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = run(app, ["generate", str(base), "a cat", "--image", str(tmp_path / "half.png")])
    assert "half.png" in str(result.exception)


def test_every_option_explains_itself() -> None:
    result = run(app, ["generate", "--help"], env={"COLUMNS": "400"})
    options = [line for line in result.stdout.splitlines() if "--" in line and "│" in line]
    assert len(options) > 15
    for line in options:
        assert len(line.split("│")[1].split(">", 1)[-1].strip()) > 10, f"no help: {line}"
