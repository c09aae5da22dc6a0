"""`manylora inspect` on a tiny diffusion model: verdict, repair, plot, and which LoRA is taken for the acceleration."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from manylora import save_adapter
from manylora.cli.app import app
from manylora.cli.inspect_image import pool_bytes
from manylora.errors import ConfigError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.models.adapter_pages import AdapterPages
from manylora.models.attach import PAGE_BYTES
from manylora.models.diffusion_base import load_diffusion_base
from manylora.models.image_repair import MIN_FACTOR
from manylora.models.tiny_diffusion import tiny_sd
from tests.image.pictures import random_adapter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("inspect-image")
    base = load_diffusion_base(tiny_sd(folder / "base", prediction="v_prediction"))
    for seed, name in enumerate(("lcm", "style", "team/other")):
        save_adapter(random_adapter(base, seed), folder / "loras" / name, "diffusers")
    (folder / "loras" / "lcm" / "distill.json").write_text("{}")
    return folder


def run(root: Path, *arguments: object) -> str:
    given = ["inspect", "--base", root / "base", "--adapters", root / "loras", *arguments]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, given)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_mixture_is_judged_beside_its_acceleration(root: Path) -> None:
    output = run(root, "lcm", "style:0.01", "team/other:0.01", "--top", 3)
    for expected in (
        "Verdict: fine",
        "against lcm:1",
        "style alone",
        "other alone",
        "broken above",
        "of base",
    ):
        assert expected in output
    facts = json.loads(run(root, "lcm", "style:0.01", "team/other:0.01", "--json"))
    assert facts["probe"]["reference"] == "lcm:1"
    assert facts["parts"] == ["other", "style"]
    assert facts["verdict"]["level"] == "fine"
    assert len(facts["pairs"]) == 3
    assert 0 < facts["relative_norm"] < 1
    assert facts["repair"] is None
    alone = json.loads(run(root, "style:0.01", "--json"))
    assert alone["probe"]["reference"] == "base"
    named = json.loads(run(root, "lcm:0.01", "style:0.01", "--fast", "style", "--json"))
    assert (named["probe"]["reference"], named["parts"]) == ("style:0.01", ["lcm"])
    accelerated = json.loads(run(root, "lcm", "--json"))
    assert (accelerated["probe"]["reference"], accelerated["parts"]) == ("base", ["lcm"])


def test_a_broken_mixture_gets_a_proposal(root: Path) -> None:
    broken = ("lcm", "style:3", "team/other:3")
    assert "Verdict: broken" in run(root, *broken)
    facts = json.loads(run(root, *broken, "--repair", "--json"))
    assert facts["verdict"]["level"] == "broken"
    proposed = facts["repair"]
    assert MIN_FACTOR <= proposed["factor"] < 1
    assert proposed["mixture"].startswith("other:")
    told = (
        "Repair: every weight times" if proposed["mends"] else "Repair: none found; even every weight times"
    )
    assert told in run(root, *broken, "--repair")
    assert "Repair: none needed" in run(root, "lcm", "style:0.01", "--repair")


def test_the_evidence_is_drawn(root: Path, tmp_path: Path) -> None:
    run(root, "lcm", "style:0.5", "team/other:0.5", "--plot", tmp_path / "plots" / "evidence.png")
    with Image.open(tmp_path / "plots" / "evidence.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50


@pytest.mark.parametrize("name", ["evidence.foo", "evidence"])
def test_a_plot_that_is_no_png_is_refused_before_anything_is_read(
    root: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"--plot .*\.png, got .*{name}"):
        run(root, "no-such-adapter", "--plot", tmp_path / name)


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_plot_that_cannot_be_written_costs_no_diagnosis(
    root: Path, tmp_path: Path, form: list[str]
) -> None:
    (tmp_path / "file").touch()
    given = ["inspect", "--base", root / "base", "--adapters", root / "loras", "style", *form]
    result = CliRunner().invoke(app, [*map(str, given), "--plot", str(tmp_path / "file" / "evidence.png")])
    assert isinstance(result.exception, ConfigError)
    assert "cannot write" in str(result.exception)
    assert "erdict" in result.output


def test_the_pool_holds_all_adapters_however_large(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Attaching(Exception):
        pass

    def refuse(*args: object, memory_bytes: int, **kwargs: object) -> None:
        raise Attaching(memory_bytes)

    sizes = []
    for num_bytes in (1 << 20, 1 << 32):
        with monkeypatch.context() as patched:
            patched.setattr(Adapter, "num_bytes", num_bytes)
            patched.setattr("manylora.models.attach.attach", refuse)
            with pytest.raises(Attaching) as attaching:
                run(root, "lcm", "style:0.5")
        sizes.append(attaching.value.args[0])
    assert sizes[0] >= 2 << 20
    assert sizes[1] >= 2 << 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_pool_holds_what_lies_worst_in_its_pages(dtype: torch.dtype) -> None:
    """Rank rows a little longer than half a page, or shorter than what a run is aligned to."""
    width = PAGE_BYTES // 2 // dtype.itemsize + 1
    for features, num_sites in (([width, width], 1), ([3, 3], 800), ([1, PAGE_BYTES // 4], 100)):
        sites = {
            str(site): LoraPair(
                torch.ones(2, features[0], dtype=dtype), torch.ones(features[1], 2, dtype=dtype), 1.0
            )
            for site in range(num_sites)
        }
        adapters = [Adapter(sites)] * 3
        pages = AdapterPages(torch.empty(1, PAGE_BYTES, dtype=torch.uint8), [[site] for site in sites])
        needed = [pages.layout(adapter).num_pages * PAGE_BYTES for adapter in adapters]
        assert sum(needed) > sum(adapter.num_bytes for adapter in adapters)
        assert sum(needed) <= pool_bytes(adapters)


def test_own_captions(root: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a cat\n\nthe sun\n")
    facts = json.loads(run(root, "style:0.5", "--probes", tmp_path / "captions.txt", "--json"))
    assert facts["probe"]["num_rows"] == 8
    assert facts["probe"]["mixture"] != json.loads(run(root, "style:0.5", "--json"))["probe"]["mixture"]


def test_what_is_for_pictures_is_refused_elsewhere(root: Path) -> None:
    with pytest.raises(ConfigError, match="for pictures"):
        CliRunner().invoke(
            app, ["inspect", str(root / "loras" / "style"), "--repair"], catch_exceptions=False
        )
    with pytest.raises(ConfigError, match="is not in the mixture"):
        run(root, "lcm", "style", "--fast", "other")
