"""The small real model that examples and measurements use, and where `make model` puts it."""

from __future__ import annotations

from pathlib import Path

from manylora.errors import ModelError

DEMO_MODEL = "smollm2-135m-instruct"
"""Its name wherever a model is asked for."""


def demo_model_path() -> Path:
    """Where the demo model's file belongs, whether it is there or not."""
    return Path.home() / ".cache" / "manylora" / "models" / "SmolLM2-135M-Instruct" / "model.gguf"


def require_demo_model() -> Path:
    """Return the demo model's file.

    Raises:
        ModelError: it is not there; says how to fetch it.
    """
    path = demo_model_path()
    if not path.is_file():
        raise ModelError(f"the demo model '{DEMO_MODEL}' is not at {path}; fetch it with `make model`")
    return path
