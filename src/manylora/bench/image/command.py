"""`manylora bench image`: load what is judged and who judges, measure a table, print it, keep it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from manylora.bench.image.accelerators import Accelerator, read_accelerators
from manylora.bench.image.cache import RowCache
from manylora.bench.image.config import ImageBenchConfig
from manylora.bench.image.judge import load_judge
from manylora.bench.image.prompts import PromptSet, alike_rows, choose_prompts, read_pictures, read_rows
from manylora.bench.image.ranks import add_cuts, ranks_table
from manylora.bench.image.report import plot, to_json, to_markdown
from manylora.bench.image.rows import (
    ImageRow,
    close_table,
    full_table,
    steps_table,
    sweep_table,
    universal_table,
)
from manylora.bench.image.table import OnProgress, RealPictures, RowFigures, Table
from manylora.bench.image.weights import weights_markdown, weights_picture, weights_table
from manylora.bench.machine import describe_machine, describe_revision
from manylora.bench.records import records_folder
from manylora.errors import ConfigError
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture
from manylora.models.diffusion_base import load_diffusion_base
from manylora.training.aside import write_text_aside


def bench_image(config: ImageBenchConfig) -> dict[str, Any]:
    """Measure a table; print it, unless `json`, and last its record as one JSON object. Returns the record."""
    revision = describe_revision()
    if config.record and revision.dirty:
        raise ConfigError(
            "the working tree differs from its commit, so no row is kept: commit, or drop record"
        )
    started = datetime.now(UTC).isoformat(timespec="seconds")
    rows = rows_of(config)
    with open_table(config) as table:
        figures = _measured(table, rows)
        record = {
            "bench": "image",
            "table": config.table,
            "commit": revision.commit,
            "dirty": revision.dirty,
            "started": started,
            "command": command_line(config),
            "config": _settings(config),
            "base_hash": table.base.content_hash(),
            "judge": {"sha256": table.judge.sha256, **table.judge.about},
            "style_judge": None
            if table.style_judge is None
            else {"sha256": table.style_judge.sha256, **table.style_judge.about},
            "prompts": _told(table.prompts, config),
            "num_reference": table.num_reference,
            "machine": asdict(describe_machine()),
            "rows": [to_json(row) for row in figures],
        }
        _draw_weights(config, table, rows)
    _keep(config, record, figures)
    if not config.json:
        print(_markdown(config, figures))
    print(json.dumps(record, separators=(",", ":")))
    return record


def rows_of(config: ImageBenchConfig) -> list[ImageRow]:
    """Return the rows of the table that the config names."""
    if config.table == "sweep":
        return sweep_table(config.guidances)
    if config.table == "universal":
        return universal_table(
            config.guidance,
            config.lcm,
            config.styles,
            config.finetuned,
            config.finetuned_look,
            _phased(config),
        )
    if config.table == "ranks":
        assert config.loras is not None
        return ranks_table(
            config.guidance,
            Library(config.loras),  # only ranks are asked: the cuts themselves are the table's
            _fast(config),
            config.ranks,
            _accelerators(config, config.retrained),
        )
    if config.table == "weights":
        return weights_table(
            config.guidance, config.lcm, config.styles, config.style_weights, config.lcm_weights
        )
    if config.table == "close":
        return close_table(config.guidance, _phased(config))
    if config.table == "full":
        return full_table(config.guidance, config.lcm, config.full)
    rows = steps_table(config.guidance, config.lcm, _phased(config))
    return [row for row in rows if row.source == "sampler" or config.train_data is not None]


def open_table(config: ImageBenchConfig) -> Table:
    """Load the base, the judges and the real pictures.

    Raises:
        ModelError, DataError: one of them is missing or unfit; says what to do.
    """
    judge = load_judge(config.judge)
    style_judge = None if config.style_judge is None else load_judge(config.style_judge)
    held_out = read_rows(config.data)
    prompts = choose_prompts(held_out, config.num_prompts, config.num_seeds, config.seed)
    base = load_diffusion_base(config.base)
    size = base.default_size
    return Table(
        base,
        None if config.loras is None else _library(config),
        judge,
        style_judge,
        prompts,
        read_pictures(config.data, alike_rows(held_out, prompts), size),
        _real_pictures(config, prompts, size),
        RowCache(config.cache.expanduser()),
        guidance=config.guidance,
        batch=config.batch,
        seed=config.seed,
        within=config.chance == "seeds",
        pairs=config.table != "close",
    )


def _library(config: ImageBenchConfig) -> Library:
    assert config.loras is not None
    library = Library(config.loras)
    if config.table == "ranks":
        add_cuts(library, _fast(config), config.ranks)
    return library


def _fast(config: ImageBenchConfig) -> list[Accelerator]:
    return _accelerators(config, (config.lcm, *_phased_names(config)))


def _accelerators(config: ImageBenchConfig, names: Sequence[str]) -> list[Accelerator]:
    assert config.loras is not None
    return read_accelerators(config.loras, names)


def _phased(config: ImageBenchConfig) -> list[tuple[str, int]]:
    """The LoRAs distilled by phases, as mixtures name them, each with its number of steps.

    Raises:
        ConfigError: one of them was not.
    """
    found = _accelerators(config, _phased_names(config))
    others = [one.name for one in found if one.sampler == "lcm"]
    if others:
        raise ConfigError(
            f"phased names {others}, whose distill.json does not say that they were distilled so; an LCM-LoRA is "
            "named with lcm"
        )
    return [(text, one.steps[0]) for text, one in zip(config.phased, found, strict=True)]


def _phased_names(config: ImageBenchConfig) -> list[str]:
    return [Mixture.parse(text).names[0] for text in config.phased]


def command_line(config: ImageBenchConfig) -> str:
    """Return the command that measures this table, with the options that are not the default."""
    parts = ["manylora bench image"]
    defaults = {"base": None, "judge": None, "data": None}
    for name, value in _settings(config).items():
        field = ImageBenchConfig.__dataclass_fields__[name]
        default = defaults.get(name, field.default)
        given = tuple(value) if isinstance(value, list) else value
        if name not in ("record", "cache", "out", "json") and given != default:
            shown = ",".join(f"{item}" for item in value) if isinstance(value, list) else value
            parts.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(parts)


def _measured(table: Table, rows: Sequence[ImageRow]) -> list[RowFigures]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(rows) * len(table.prompts))

        def follow(number: int) -> OnProgress:
            def show(label: str, done: int) -> None:
                progress.update(bar, description=label, completed=number * len(table.prompts) + done)

            return show

        figures = []
        for number, row in enumerate(rows):
            figures.append(table.figures(row, follow(number)))
            progress.update(bar, completed=(number + 1) * len(table.prompts))
            if not sys.stderr.isatty():  # a log file shows no bar
                print(f"{number + 1}/{len(rows)} {row.label}: KID {figures[-1].kid}", file=sys.stderr)
    return figures


def _keep(config: ImageBenchConfig, record: dict[str, Any], figures: Sequence[RowFigures]) -> None:
    """Write the record, and where asked the table and the plot."""
    folder = records_folder()
    wanted = not record["dirty"] if config.record is None else config.record
    if wanted and folder is not None:
        name = f"{record['started'][:10]}_{describe_machine().slug}_image-{config.table}.json"
        write_text_aside(folder / name, json.dumps(record, indent=1) + "\n")
    if config.out is not None:
        write_text_aside(config.out / f"{config.table}.json", json.dumps(record, indent=1) + "\n")
        head = (
            f"`{record['command']}`, commit {record['commit']}, judge {record['judge']['sha256'][:12]}\n\n"
        )
        write_text_aside(config.out / f"{config.table}.md", head + _markdown(config, figures))
        if config.table != "weights":
            plot(
                figures,
                config.out / f"{config.table}.png",
                f"{len(record['rows'])} rows, commit {record['commit']}",
            )


def _markdown(config: ImageBenchConfig, figures: Sequence[RowFigures]) -> str:
    """The table, and before it the map of each style where that is what was asked."""
    if config.table != "weights":
        return to_markdown(figures)
    maps = [
        weights_markdown(figures, config.lcm, style, config.style_weights, config.lcm_weights)
        for style in config.styles
    ]
    return "\n".join([*maps, to_markdown(figures)])


def _draw_weights(config: ImageBenchConfig, table: Table, rows: Sequence[ImageRow]) -> None:
    """Draw each style's map as one labelled picture."""
    if config.table != "weights" or config.out is None:
        return
    config.out.mkdir(parents=True, exist_ok=True)
    for style in config.styles:
        drawn = weights_picture(table, rows, config.lcm, style, config.style_weights, config.lcm_weights)
        drawn.save(config.out / f"weights-{style}.png")


def _real_pictures(config: ImageBenchConfig, prompts: PromptSet, size: int) -> RealPictures | None:
    """As many pictures of the training set as there are prompts, in the prompts' mix of kinds."""
    if config.train_data is None:
        return None
    rows = alike_rows(read_rows(config.train_data), prompts, len(prompts))
    pixels = read_pictures(config.train_data, rows, size)
    return RealPictures(pixels, [row["subjects"] for row in rows], [row["kind"] for row in rows])


def _told(prompts: PromptSet, config: ImageBenchConfig) -> dict[str, Any]:
    return {
        "num_prompts": config.num_prompts,
        "num_seeds": config.num_seeds,
        "num_pictures": len(prompts),
        "by_kind": prompts.counts,
    }


def _settings(config: ImageBenchConfig) -> dict[str, Any]:
    """Settings as JSON values; a path as it was given, but below the home folder without its name."""
    values = {name: getattr(config, name) for name in ImageBenchConfig.__dataclass_fields__}
    home = str(Path.home())
    return {
        name: list(value)
        if isinstance(value, tuple)
        else str(value).replace(home, "~")
        if isinstance(value, Path | str)
        else value
        for name, value in values.items()
    }
