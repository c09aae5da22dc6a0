"""What a record says of its settings: without places of somebody's machine, and as the command that measures again."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from manylora.bench.first_token.config import FirstTokenConfig
    from manylora.bench.kernels.config import KernelsConfig
    from manylora.bench.steps.config import StepsConfig

ConfigT = TypeVar("ConfigT", "FirstTokenConfig", "KernelsConfig", "StepsConfig")

DTYPES = ("float32", "bfloat16", "float16", "int8")
"""What a model may compute in; int8: its base products, all else in float32."""

LEFT_OUT = ("force", "record", "json")
"""What is done with a result is no part of what was measured."""


def told(config: ConfigT) -> ConfigT:
    """The settings without where the model lies on somebody's machine."""
    model = Path(config.model).name if Path(config.model).exists() else config.model
    return replace(config, model=model)


def command_line(kind: str, config: ConfigT) -> str:
    """The command that measures this again, with the options that are not the default."""
    parts = ["manylora", "bench", kind]
    for option in fields(config):
        value = getattr(told(config), option.name)
        if option.name not in LEFT_OUT and value != option.default:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts += [f"--{option.name.replace('_', '-')}", shown]
    return shlex.join(parts)


def settings_digest(config: ConfigT) -> str:
    """Short enough for a file name: equal settings are one measurement."""
    settings = {name: value for name, value in asdict(told(config)).items() if name not in LEFT_OUT}
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
