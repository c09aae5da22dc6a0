"""Pictures as PNG files that say how they were made. Knows no engine."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from manylora.errors import DataError
from manylora.image.output import Picture
from manylora.lora.peft_folder import replace_file
from manylora.version import __version__

SETTINGS_KEY = "manylora"
"""Text chunk with all settings as JSON."""

PARAMETERS_KEY = "parameters"
"""Text chunk in the layout of A1111's web interface, which many programs show and read."""

_SAMPLER_NAMES = {
    "lcm": "LCM",
    "ddim": "DDIM",
    "euler": "Euler",
    "dpm-solver++": "DPM++ 2M",
    "unipc": "UniPC",
}


def save_png(image: Image.Image, path: Path, chunks: Mapping[str, str]) -> None:
    """Write a picture with text chunks; whoever reads meanwhile gets the old file or the new one.

    Raises:
        OSError: the disk is full, the folder cannot be written; nothing is left behind.
    """
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    replace_file(path, data.getvalue())


def chunks_of(picture: Picture) -> dict[str, str]:
    """What a picture's file says of it."""
    settings = json.dumps({**picture.settings, "version": __version__}, ensure_ascii=False)
    return {PARAMETERS_KEY: parameters_text(picture), SETTINGS_KEY: settings}


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that a file says it was made with.

    Raises:
        DataError: no picture, or one that was not written here.
    """
    try:
        with Image.open(path) as image:
            image.load()
            settings = json.loads(image.info[SETTINGS_KEY])
    except KeyError:
        raise DataError(
            f"'{path}' does not say how it was made: it has no text chunk '{SETTINGS_KEY}'"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as a picture with its settings: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"'{path}': expected its settings as a JSON object, got {type(settings).__name__}")
    return settings


def parameters_text(picture: Picture) -> str:
    """How A1111's web interface would put it: prompt with LoRAs, negative prompt, and one line of the rest."""
    params = picture.params
    loras = "".join(f" <lora:{name}:{weight:g}>" for name, weight in picture.mixture.weights)
    rest = {
        "Steps": params.steps,
        "Sampler": _SAMPLER_NAMES[params.sampler],
        "CFG scale": f"{params.guidance:g}",
        "Seed": params.seed,
        "Size": f"{params.width}x{params.height}",
        "Model": picture.base.rstrip("/").rpartition("/")[2],
        "Denoising strength": None if params.strength is None else f"{params.strength:g}",
        "Version": f"manylora {__version__}",
    }
    line = ", ".join(f"{key}: {value}" for key, value in rest.items() if value is not None)
    negative = [f"Negative prompt: {params.negative_prompt}"] if params.negative_prompt else []
    return "\n".join([picture.prompt + loras, *negative, line])
