"""Where the recipe keeps things: what can be made again in `icons/`, what took hours in `runs/icons/`."""

import os
from pathlib import Path

_CACHE = Path(os.environ.get("MANYLORA_ICONS_CACHE", Path.home() / ".cache" / "manylora"))

SETS_FOLDER = _CACHE / "icons" / "sets"
DATA_FOLDER = _CACHE / "icons" / "data"
LATENTS_FOLDER = _CACHE / "icons" / "latents"
RUNS_FOLDER = _CACHE / "runs" / "icons"
