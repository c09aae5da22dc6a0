"""`manylora generate` on a tiny base, through the same door as a user's."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

from manylora.cli.app import app
from manylora.errors import ConfigError, DataError, ManyLoraError
from manylora.image import engine
from manylora.image.pixels import to_image
from manylora.image.png import read_settings
from manylora.lora.convert import save_adapter
from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base
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
    return [json.loads(line) for line in result.stdout.split("\n") if line]


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


def requests_in(folder: Path, *rows: object) -> Path:
    file = folder / "requests.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def test_pictures_are_numbered_and_told_in_the_order_of_their_lines(base: Path, tmp_path: Path) -> None:
    """Whichever are done first: the third shares the batch of the first."""
    file = requests_in(
        tmp_path,
        {"prompt": "a", "steps": 2, "seed": 1},
        {"prompt": "b", "steps": 1, "seed": 1, "n": 2},
        {"prompt": "c", "steps": 2, "seed": 1},
        {"prompt": "d", "width": 17, "n": 3},
        {"prompt": "e", "steps": 1, "seed": 1},
    )
    told = generate(base, tmp_path / "out", "--file", str(file), exit_code=1)
    assert [picture["prompt"] for picture in told] == ["a", "b", "b", "c", "d", "e"]
    names = [told_of and Path(str(told_of)).name for told_of in (picture["path"] for picture in told)]
    # What was refused has its number, once.
    assert names == ["00000-1.png", "00001-1.png", "00002-2.png", "00003-1.png", None, "00005-1.png"]
    for picture in told:
        if picture["path"] is not None:
            assert read_settings(Path(str(picture["path"])))["prompt"] == picture["prompt"]


def test_what_is_made_is_written_before_something_breaks(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures were written at the end, so that whatever came before it took them all."""
    decode, num_decoded = DiffusionBase.decode_latents, 0

    def break_off(self: DiffusionBase, latents: torch.Tensor) -> torch.Tensor:
        nonlocal num_decoded
        num_decoded += 1
        if num_decoded == 3:
            raise MemoryError("no memory left")
        return decode(self, latents)

    monkeypatch.setattr(DiffusionBase, "decode_latents", break_off)
    file = requests_in(tmp_path, *[{"prompt": "a cat", "steps": 1, "seed": seed} for seed in range(4)])
    fixed = ["--file", str(file), "--out", str(tmp_path / "out"), "--max-batch", "1", "--json"]
    result = run(app, ["generate", str(base), *fixed])
    assert isinstance(result.exception, MemoryError)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000-0.png", "00001-1.png"]
    assert [json.loads(line)["seed"] for line in result.stdout.splitlines()] == [0, 1]


def test_pictures_are_held_no_longer_than_needed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those that are made, nor those that are started from, which were all read before the first step."""
    num_read = 0
    made: list[weakref.ref[Image.Image]] = []
    held: list[int] = []
    read_ahead: list[int] = []

    def read(image: Image.Image) -> Image.Image:
        nonlocal num_read
        num_read += 1
        return turned(image)

    def draw(pixels: torch.Tensor) -> Image.Image:
        image = to_image(pixels)
        gc.collect()
        held.append(sum(one() is not None for one in made))
        read_ahead.append(num_read - len(made))
        made.append(weakref.ref(image))
        return image

    turned = ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", read)
    monkeypatch.setattr(engine, "to_image", draw)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    row = {"prompt": "a cat", "image": str(tmp_path / "red.png"), "steps": 1, "strength": 1}
    file = requests_in(tmp_path, *[row] * 20)
    generate(base, tmp_path / "out", "--file", str(file), "--max-batch", "1")
    assert len(made) == num_read == 20
    assert max(held) <= 2
    assert 1 < max(read_ahead) < 10, "some wait, to fill batches"


def test_a_picture_to_start_from_that_ends_early_fails_alone(base: Path, tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    rows = [{"prompt": "a cat", "image": str(tmp_path / f"{name}.png")} for name in ("half", "whole")]
    half, whole = generate(base, tmp_path / "out", "--file", str(requests_in(tmp_path, *rows)), exit_code=1)
    assert "cannot read the picture" in str(half["error"])
    assert "half.png" in str(half["error"])
    assert whole["error"] is None


def test_what_another_run_wrote_meanwhile_is_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "out" / "00000-1.png"

    def draw(pixels: torch.Tensor) -> Image.Image:
        other.parent.mkdir()
        other.write_bytes(b"of another run")
        return to_image(pixels)

    monkeypatch.setattr(engine, "to_image", draw)
    (told,) = generate(base, tmp_path / "out", "a cat", "--seed", "1")
    assert other.read_bytes() == b"of another run"
    assert read_settings(Path(str(told["path"])))["seed"] == 1


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


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ('{"prompt": "a", "cfg": 1}', "cfg"),
        ("[]", "expected a JSON object, got list"),
        ('{"prompt": "a", "steps": "2"}', "image parameter steps: expected an integer"),
        ('{"prompt": "a", "lora": ["nobody"]}', "no adapter 'nobody'"),
        ('{"prompt": "a", "lora": "nobody:0.5"}', "no adapter 'nobody'"),
        ('{"prompt": "a", "lora": 5}', "expected a mixture"),
        ('{"prompt": 5}', "expected the prompt as text, got 5"),
        ('{"prompt": "\\ud83d"}', "not JSON"),
        ('{"prompt": "a", "image": 5}', "expected the picture to start from as a path, got 5"),
        ('{"prompt": "a", "image": "no-such.png"}', "cannot read the picture 'no-such.png'"),
    ],
)
def test_a_malformed_line_is_named(base: Path, tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + line + "\n")
    result = run(app, ["generate", str(base), "--file", str(file), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, ManyLoraError)
    assert f"{file}, line 3: " in str(result.exception)
    assert says in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "café"}\n'.encode("latin-1"), "'utf-8'"),
        (b"", "no request"),
        (b"\n  \n", "no request"),
    ],
)
def test_a_file_without_requests_is_refused_before_anything_is_loaded(
    tmp_path: Path, content: bytes, says: str
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(content)
    result = run(app, ["generate", "no-such-base", "--file", str(file)])
    assert isinstance(result.exception, ConfigError | DataError)
    assert says in str(result.exception)
    assert str(file) in str(result.exception)


def test_only_a_line_feed_ends_a_line(base: Path, tmp_path: Path) -> None:
    """JSON takes U+2028 within a text as it is; the line was cut there."""
    prompt = "a cat\u2028in a hat\x85"
    (told,) = generate(base, tmp_path, "--file", str(requests_in(tmp_path, {"prompt": prompt})))
    assert told["prompt"] == prompt


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
