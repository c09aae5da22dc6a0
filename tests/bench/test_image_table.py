"""A table on a tiny random base: rows are what the engine makes, distances are paired, and nothing is done twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from manylora.bench.image import command as image_command
from manylora.bench.image.command import bench_image, open_table, rows_of
from manylora.bench.image.config import ImageBenchConfig
from manylora.bench.image.judge import JudgeNet, JudgeSize, save_judge
from manylora.bench.image.prompts import alike_rows, choose_prompts, read_rows
from manylora.bench.image.ranks import cut_name
from manylora.bench.image.report import from_json, lines_by_label, to_json, to_markdown
from manylora.bench.image.rows import (
    ImageRow,
    close_table,
    find_row,
    full_table,
    steps_table,
    universal_table,
)
from manylora.bench.image.sample import RowSampler
from manylora.bench.image.weights import mixture_of
from manylora.errors import ConfigError, DataError
from manylora.image.engine import ImageEngine
from manylora.image.params import ImageParams
from manylora.lora.convert import save_adapter
from manylora.lora.library import Library
from manylora.models.diffusion_base import load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd
from tests.image.pictures import random_adapter

NAMES = ("cat", "dog", "house", "tree")
GUIDANCE = 2.0


def write_pictures(folder, num_singles, num_pairs, seed, kinds=("pair",)):
    draw, lines = np.random.default_rng(seed), []
    folder.mkdir(parents=True)
    for i in range(num_singles + num_pairs):
        subjects = [NAMES[i % 4]] if i < num_singles else [NAMES[i % 4], NAMES[(i + 1) % 4]]
        kind = "single" if i < num_singles else kinds[i % len(kinds)]
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        text = " and ".join(f"a {name}" for name in subjects)
        lines.append(
            json.dumps({"file_name": f"{i}.png", "text": text, "subjects": subjects, "kind": kind})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_loras(folder, names):
    """A LoRA on disk for each name; which one it is depends on its place alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = load_diffusion_base(tiny_sd(folder.parent / f"{folder.name}-base"))
    for seed, name in enumerate(names):
        save_adapter(random_adapter(tiny, seed), folder / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, LoRAs, two judges and pictures, all tiny and random."""
    folder = tmp_path_factory.mktemp("image-bench")
    tiny_sd(folder / "base", prediction="v_prediction")
    tiny_sd(folder / "finetuned", seed=1, prediction="v_prediction")
    write_loras(folder / "loras", ["lcm", "paper-cut"])
    write_pictures(folder / "held_out", 8, 6, 0, kinds=("pair", "new pair"))
    write_pictures(folder / "train", 20, 20, 1, kinds=("pair", "new pair"))
    for name, looks in (("judge", ("noto",)), ("style-judge", ("base", "paper-cut"))):
        torch.manual_seed(len(looks))
        net = JudgeNet(4, len(looks), JudgeSize((4, 8, 8, 8))).eval()
        save_judge(folder / name, net, JudgeSize((4, 8, 8, 8)), NAMES, looks, {"held_out_accuracy": {}})
    return folder


def config_of(world: Path, **settings) -> ImageBenchConfig:
    values: dict[str, Any] = dict(
        base=str(world / "base"),
        judge=world / "judge",
        data=world / "held_out",
        train_data=world / "train",
        loras=world / "loras",
        guidance=GUIDANCE,
        num_prompts=6,
        num_seeds=2,
        batch=5,
        cache=world / "cache",
        record=False,
    )
    return ImageBenchConfig(**(values | settings))


@pytest.fixture(scope="module")
def table(world):
    with open_table(config_of(world)) as table:
        yield table


def test_prompts_are_distinct_captions_of_every_kind(world):
    rows = read_rows(world / "held_out")
    prompts = choose_prompts(rows, 8, 3)
    assert len(prompts) == 24
    assert len(set(prompts.captions)) == 8
    assert len(set(prompts.seeds)) == 24
    assert prompts.counts == {"single": 12, "pair": 6, "new pair": 6}
    alike = alike_rows(rows, prompts)
    assert [row["kind"] for row in alike].count("single") == 6
    assert len(alike) == 12
    with pytest.raises(DataError, match=r"no picture is of \['new pair', 'pair'\]"):
        alike_rows([row for row in rows if row["kind"] == "single"], prompts)
    with pytest.raises(DataError, match="8 distinct captions"):
        choose_prompts(rows, 9, 1)
    with pytest.raises(DataError, match="image folder"):
        read_rows(world)


def test_only_a_line_feed_ends_a_row(tmp_path):
    """The other ends of lines that Python knows may stand in a JSON text; empty lines are skipped."""
    rows = [
        {"file_name": "a.png", "text": f"a{end}cat", "subjects": ["cat"], "kind": "single"}
        for end in ("\u2028", "\u2029", "\x85")
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_rows(tmp_path) == rows


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "line 3: not JSON"),
        (b"[1]", "line 3: expected a JSON object, got list"),
        (b'{"file_name": "a.png"}', "line 3: lacks subjects, text"),
        (b"\xff", "cannot be read: .*utf-8"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, problem):
    row = json.dumps({"file_name": "a.png", "text": "a cat", "subjects": ["cat"]}).encode()
    (tmp_path / "metadata.jsonl").write_bytes(row + b"\n\n" + line)
    with pytest.raises(DataError, match=rf"metadata\.jsonl,? {problem}"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance", "lora"),
    [("ddim", 3, 2.0, ""), ("dpm-solver++", 3, 1.0, ""), ("lcm", 2, 1.0, "lcm:1+paper-cut:0.8")],
)
def test_a_row_is_what_the_engine_makes(world, sampler, steps, guidance, lora):
    base, library = load_diffusion_base(world / "base"), Library(world / "loras")
    prompts = choose_prompts(read_rows(world / "held_out"), 4, 2)
    row = ImageRow(label="", sampler=sampler, steps=steps, guidance=guidance, lora=lora)
    with RowSampler(base, library, batch=3) as sampler_of_rows:
        ours = base.decode_latents(sampler_of_rows.run(row, prompts).latents)
        plain = base.decode_latents(sampler_of_rows.run(replace(row, lora=""), prompts).latents)
    assert ((ours - plain).abs().max() > 0.01) == bool(lora)
    params = [
        ImageParams(sampler=sampler, steps=steps, guidance=guidance, seed=seed) for seed in prompts.seeds
    ]
    with ImageEngine(base, library) as engine:
        pictures = engine.generate(prompts.captions, params, [lora or None] * len(prompts))
    for picture, own in zip(pictures, ours, strict=True):
        assert picture.image is not None
        wanted = torch.from_numpy(np.array(picture.image)).permute(2, 0, 1) / 127.5 - 1
        assert (own.clamp(-1, 1) - wanted).abs().max() <= 1.01 / 127.5


def test_distances_are_measured_from_the_teachers_own_noise(table):
    teacher = table.figures(ImageRow(label="t", steps=50, guidance=GUIDANCE))
    assert teacher.paired_rmse.value == 0.0
    few = [table.figures(ImageRow(label="f", steps=n, guidance=GUIDANCE)).paired_rmse for n in (16, 2)]
    assert 0 < few[0].value < few[1].value
    # LCM draws fresh noise between steps: only its one step has a partner.
    one, four = (table.figures(ImageRow(label="l", sampler="lcm", steps=n, lora="lcm")) for n in (1, 4))
    assert one.paired_rmse.value > 0
    assert four.paired_rmse is None
    assert four.accuracy.low <= four.accuracy.value <= four.accuracy.high


def test_what_is_measured_is_not_sampled_again(world, monkeypatch):
    config = config_of(world, cache=world / "own-cache")
    row, seen = ImageRow(label="a", steps=3), []
    with open_table(config) as table:
        first = table.figures(row, lambda label, done: seen.append(done))
    assert seen == [5, 10, 12] * 2  # the teacher's too, once, for the paired distance
    with open_table(config) as table:
        monkeypatch.setattr(RowSampler, "run", None)
        again = table.figures(replace(row, label="another name"))
        with pytest.raises(TypeError):  # other settings are another row
            table.figures(replace(row, steps=4))
        with pytest.raises(TypeError):
            table.figures(replace(row, lora="lcm"))
    assert replace(again, row=row) == first


@pytest.mark.parametrize("file", ["text_encoder/model.safetensors", "scheduler/scheduler_config.json"])
def test_other_parts_of_the_base_are_another_measurement(world, tmp_path, monkeypatch, file):
    shutil.copytree(world / "base", tmp_path / "base")
    config, row = (
        config_of(world, base=str(tmp_path / "base"), cache=tmp_path / "cache"),
        ImageRow(label="a", steps=2),
    )
    with open_table(config) as table:
        first = table.figures(row)
    changed = tmp_path / "base" / file
    if changed.suffix == ".json":
        told = json.loads(changed.read_text())
        changed.write_text(json.dumps(told | {"beta_end": 0.9 * told["beta_end"]}))
    else:
        save_file({name: 1.1 * tensor for name, tensor in load_file(changed).items()}, changed)
    with open_table(config) as table:
        assert table.figures(row).kid != first.kid


def test_a_killed_row_leaves_nothing_that_counts(world, monkeypatch):
    config, row = config_of(world, cache=world / "cut-cache"), ImageRow(label="a", steps=2)

    def interrupt(label, done):
        if done == 10:
            raise KeyboardInterrupt

    with open_table(config) as table, pytest.raises(KeyboardInterrupt):
        table.figures(row, interrupt)
    assert not list((world / "cut-cache").rglob("*.safetensors"))
    with open_table(config) as table:
        assert table.figures(row).paired_rmse is not None


def test_another_judge_or_lora_is_another_measurement(world, table, tmp_path):
    row = ImageRow(label="a", sampler="lcm", steps=1, lora="lcm")
    net = JudgeNet(4, 1, JudgeSize((4, 8, 8, 8))).eval()
    save_judge(tmp_path / "judge", net, JudgeSize((4, 8, 8, 8)), NAMES, ("noto",), {})
    with open_table(config_of(world, judge=tmp_path / "judge")) as other:
        assert other.figures(row).kid != table.figures(row).kid
        assert other.figures(row).paired_rmse == table.figures(row).paired_rmse
    write_loras(tmp_path / "loras", ["paper-cut", "lcm"])  # the names exchanged
    with open_table(config_of(world, loras=tmp_path / "loras")) as other:
        assert other.figures(row).paired_rmse != table.figures(row).paired_rmse


def test_the_steps_table_is_measured_and_kept(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_command, "records_folder", lambda: tmp_path / "records")
    monkeypatch.setattr(image_command, "describe_revision", lambda: image_command_revision(dirty=False))
    config = config_of(world, out=tmp_path / "out", record=True)
    record = bench_image(config)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == json.loads(json.dumps(record))
    assert len(printed.splitlines()) > 40
    alone = bench_image(replace(config, json=True, record=False, out=None, table="sweep", guidances=(1.0,)))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(alone))
    (kept,) = (tmp_path / "records").glob("*image-steps.json")
    rows = json.loads(kept.read_text())["rows"]
    assert len(rows) == len(rows_of(config)) == 40
    assert record["prompts"]["num_pictures"] == 12
    assert str(Path.home()) not in kept.read_text()
    figures = [from_json(row) for row in rows]
    assert [to_json(row) for row in figures] == record["rows"]
    assert find_row([f.row for f in figures], sampler="lcm", steps=4, lora="lcm").guidance == 1.0
    (real, vae) = figures[:2]
    assert real.paired_rmse is vae.paired_rmse is None
    assert real.kid != vae.kid
    with Image.open(tmp_path / "out" / "steps.png") as plot:
        assert plot.width > 600
    markdown = (tmp_path / "out" / "steps.md").read_text()
    assert markdown.count("\n| ") == 41
    assert "LCM-LoRA, 4 steps, unguided" in markdown
    assert "style kept" not in markdown
    assert set(lines_by_label(figures)) >= {"LCM-LoRA, unguided", "ddim, guidance 2"}


def image_command_revision(*, dirty):
    from manylora.bench.machine import Revision

    return Revision("abc1234", dirty)


def test_the_universal_table_says_whether_style_and_prompt_are_kept(world):
    config = config_of(
        world,
        table="universal",
        style_judge=world / "style-judge",
        styles=("paper-cut",),
        finetuned=str(world / "finetuned"),
        finetuned_look="paper-cut",
        num_prompts=4,
        train_data=None,
    )
    rows = rows_of(config)
    assert {row.lora for row in rows} == {"", "lcm", "paper-cut:0.8", "paper-cut:0.8+lcm"}
    with open_table(config) as table:
        alone = table.figures(find_row(rows, lora="paper-cut:0.8", steps=4))
        fast = table.figures(find_row(rows, lora="paper-cut:0.8+lcm", steps=4))
        base = table.figures(find_row(rows, lora="lcm", base=""))
        elsewhere = table.figures(find_row(rows, lora="lcm", steps=4, base=str(world / "finetuned")))
    assert base.look_share is None
    assert base.style_accuracy is not None
    for figures in (alone, fast, elsewhere):
        assert figures.look_share is not None
        assert 0 <= figures.look_share.value <= 1
    # The same LoRA in a base with other weights draws other pictures.
    assert elsewhere.kid != base.kid
    assert elsewhere.paired_rmse is None
    assert "style kept" in to_markdown([alone, fast])


def test_the_ranks_table_cuts_the_lora(world):
    config = config_of(world, table="ranks", ranks=(8, 2, 1), num_prompts=4, train_data=None)
    rows = rows_of(config)
    # Rank 4 as it is: a cut to 8 would be none.
    assert [row.lora for row in rows if row.steps == 4] == ["lcm", cut_name("lcm", 2), cut_name("lcm", 1)]
    with open_table(config) as table:
        whole, two, one = (
            table.figures(find_row(rows, steps=1, lora=lora))
            for lora in ("lcm", cut_name("lcm", 2), cut_name("lcm", 1))
        )
    assert whole.lora_bytes == 2 * two.lora_bytes == 4 * one.lora_bytes  # type: ignore[operator]  # none is None
    away = [figures.paired_rmse.value for figures in (whole, two, one)]  # type: ignore[union-attr]
    assert len(set(away)) == 3, "what is cut draws something else"
    assert "MB of LoRAs" in to_markdown([whole])
    told = to_json(whole)
    assert from_json(told) == whole
    del told["lora_bytes"]  # a record from before the column
    assert from_json(told).lora_bytes is None


def test_the_weights_table_is_a_map_and_a_picture(world, tmp_path, monkeypatch):
    config = config_of(
        world,
        table="weights",
        style_judge=world / "style-judge",
        styles=("paper-cut",),
        style_weights=(0.0, 0.8),
        lcm_weights=(0.5, 1.0, 1.5),
        num_prompts=4,
        train_data=None,
        out=tmp_path / "out",
    )
    bench_image(config)
    with Image.open(tmp_path / "out" / "weights-paper-cut.png") as drawn:
        assert drawn.width > 3 * 96
        assert drawn.height > 2 * 96
    told = (tmp_path / "out" / "weights.md").read_text()
    assert "| paper-cut \\ lcm | 0.5 | 1 | 1.5 |" in told
    assert len([line for line in told.splitlines() if line.startswith(("| 0 |", "| 0.8 |"))]) == 2
    record = json.loads((tmp_path / "out" / "weights.json").read_text())
    pairs = {row["lora"] for row in record["rows"]}
    assert pairs >= {mixture_of("paper-cut", a, "lcm", b) for a in (0.0, 0.8) for b in (0.5, 1.0, 1.5)}


def test_a_phased_lora_is_drawn_by_ddim_in_its_steps(world, tmp_path):
    folder = tmp_path / "loras"
    write_loras(folder, ["lcm", "three"])
    record = {"objective": "phased", "num_paired_steps": 3}
    (folder / "three" / "distill.json").write_text(json.dumps(record))
    (row,) = [
        row for row in rows_of(config_of(world, loras=folder, phased=("three",))) if row.lora == "three"
    ]
    assert (row.sampler, row.steps, row.guidance, row.is_paired) == ("ddim", 3, 1.0, True)
    with pytest.raises(ConfigError, match=r"phased names \['lcm'\]"):
        rows_of(config_of(world, loras=folder, phased=("lcm",)))
    with open_table(config_of(world, loras=folder, table="close", phased=("three",))) as table:
        assert table.figures(row).paired_rmse is None, (
            "for which the teacher would have to draw fifty steps"
        )
    both = rows_of(config_of(world, loras=folder, phased=("three", "three:1.1")))
    (stronger,) = [row for row in both if row.lora == "three:1.1"]
    assert stronger.label == "phased LoRA at 1.1, 3 steps, unguided"
    assert (stronger.sampler, stronger.steps) == ("ddim", 3)


def test_tables_name_each_row_once():
    for rows in (
        steps_table(2.5, "lcm", phased=[("four", 4), ("one", 1)]),
        close_table(2.5, [("four", 4), ("four:1.1", 4), ("cut", 4), ("one", 1)]),
        full_table(2.5, "lcm", "full"),
        universal_table(2.5, "lcm", ["a", "b"], "finetuned", "a"),
    ):
        labels = [row.label for row in rows]
        assert len(set(labels)) == len(labels)
    assert find_row(steps_table(2.5, "lcm"), sampler="unipc", steps=2, guidance=2.5).unet_calls == 4
    with pytest.raises(ConfigError, match="expected one row"):
        find_row(steps_table(2.5, "lcm"), sampler="unipc")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_prompts": 3}, "num_prompts"),
        ({"loras": None}, "loras"),
        ({"table": "universal"}, "style_judge"),
        ({"styles": ("paper-cut",)}, "belong to the tables universal and weights"),
        ({"table": "weights"}, "style_judge"),
        ({"table": "ranks", "ranks": (4, 0)}, "ranks must be at least 1"),
        ({"table": "ranks", "full": "x"}, "the table full, and no other"),
        ({"table": "full"}, "wants full"),
        ({"retrained": ("a",)}, "belongs to the table ranks"),
        ({"table": "sweep", "phased": ("a",)}, "phased belongs"),
        ({"phased": ("a:1+b:0.5",)}, "one by one"),
        ({"table": "ranks", "phased": ("a:1.1",)}, "without weights"),
        ({"table": "close"}, "name one at least with phased"),
        ({"guidance": 0.5}, "guidance"),
        ({"table": "other"}, "table"),
    ],
)
def test_settings_that_make_no_sense_are_refused(world, settings, says):
    with pytest.raises(ConfigError, match=says):
        config_of(world, **settings)
