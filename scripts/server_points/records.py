"""Kept records of `manylora bench serve`: the newest that a figure's script made, and its runs."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from manylora.bench.serve.config import ServeBenchConfig
from manylora.models.demo_model import DEMO_MODEL
from tested import ROOT

RECORDS = ROOT / "benchmarks" / "records"
FIGURES = ROOT / "benchmarks" / "figures"
LEFT_OUT = {"--out", "--adapters-folder"}
"""Options that say where things lie: a record's command does not have them."""

Row = dict[str, Any]
Settings = dict[str, list[str | float]]


def newest(script: str, kind: str, num_adapters: int, folder: Path = RECORDS) -> dict[str, Any] | None:
    """The newest record of a kind with so many adapters that has the settings of a figure's script."""
    wanted = figure_settings(script, adapters=num_adapters)
    files = folder.glob(f"*_serve-{kind}-{num_adapters}-*.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    fitting = [record for record in records if command_settings(record["command"]) == wanted]
    return max(fitting, key=lambda record: str(record["started"]), default=None)


def figure_settings(script: str, **variables: object) -> Settings:
    """What benchmarks/figures/SCRIPT measures, where its variables have these values."""
    text = (FIGURES / script).read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"manylora bench serve .*", text)
    for name, value in {"MODEL": DEMO_MODEL, **variables}.items():
        command = command.replace(f"${name}", str(value))
    return command_settings(command.replace('"$@"', ""))


def command_settings(command: str) -> Settings:
    """Every setting of a `manylora bench serve` command: its options, and the defaults of the others."""
    _, _, _, *words = shlex.split(command)
    given = dict(zip(words[::2], words[1::2], strict=True))
    defaults = {f"--{field.name.replace('_', '-')}": field.default for field in fields(ServeBenchConfig)}
    assert given.keys() <= defaults.keys(), f"unknown options {sorted(given.keys() - defaults.keys())}"
    written = {name: _written(default) for name, default in defaults.items()} | given
    return {name: _values(text) for name, text in written.items() if name not in LEFT_OUT}


def said(record: dict[str, Any]) -> str:
    """Where figures are from."""
    commits = dict.fromkeys(row["commit"] for row in record["rows"])
    return (
        f"{record['started'][:10]}, commit {', '.join(commits)}{' with changes' if record['dirty'] else ''}"
    )


def find(record: dict[str, Any], **wanted: object) -> Row | None:
    """The run with these settings; None where there is none."""
    for row in record["rows"]:
        if all(row["run"][name] == value for name, value in wanted.items()):
            return dict(row)
    return None


def _written(default: object) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _values(text: str) -> list[str | float]:
    """1 and 1.0 are one value."""
    return [float(part) if re.fullmatch(r"-?[\d.]+", part) else part for part in text.split(",")]
