"""From what a user calls a model to files on this machine: a directory, a GGUF file, a hub id, the demo model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from manylora.errors import ModelError
from manylora.models.demo_model import DEMO_MODEL, require_demo_model

# A repository may also hold the same weights for other libraries (consolidated.*, *.bin, *.onnx): not fetched.
_HUB_PATTERNS = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]
_HUB_TOKENIZER_PATTERNS = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
]
_HUB_TEMPLATE_PATTERNS = ["chat_template*"]


@dataclass(frozen=True)
class ModelFiles:
    """One model on disk."""

    name: str
    """How messages call it."""

    directory: Path
    gguf: Path | None
    """The file that holds everything, or None: `directory` is laid out as transformers does."""


def locate(source: str | Path) -> ModelFiles:
    """Find the model that `source` names, downloading it only if it is a hub id that the cache does not hold.

    Args:
        source: a directory in transformers' layout, a .gguf file, a directory with exactly one .gguf and no
            config.json, the demo model's name, or a hub id ("org/name").
    Raises:
        ModelError: nothing of that name, several GGUF files, or a hub that cannot be reached.
    """
    if source == DEMO_MODEL:
        return ModelFiles(DEMO_MODEL, require_demo_model().parent, require_demo_model())
    path = Path(source).expanduser()
    if path.is_file():
        return _gguf_file(path)
    if path.is_dir():
        return _directory(path)
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return ModelFiles(source, _from_hub(source), None)
    raise ModelError(
        f"no model '{source}': no such directory or .gguf file, not the name of a hub repository (org/name) "
        f"and not '{DEMO_MODEL}'"
    )


def _gguf_file(path: Path) -> ModelFiles:
    if path.suffix != ".gguf":
        raise ModelError(f"'{path}' is a file, but no .gguf; give the directory that holds config.json")
    return ModelFiles(path.stem if path.stem != "model" else path.absolute().parent.name, path.parent, path)


def _directory(path: Path) -> ModelFiles:
    if (path / "config.json").is_file():
        return ModelFiles(path.absolute().name, path, None)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _gguf_file(ggufs[0])
    if ggufs:
        raise ModelError(
            f"'{path}' holds several GGUF files, name one of them: {[file.name for file in ggufs]}"
        )
    raise ModelError(f"'{path}' holds neither config.json nor a .gguf file")


def _from_hub(repo_id: str) -> Path:
    patterns = _HUB_PATTERNS + _HUB_TOKENIZER_PATTERNS + _HUB_TEMPLATE_PATTERNS
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model '{repo_id}' is no directory here, not in the hub's cache, and could not be fetched: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
