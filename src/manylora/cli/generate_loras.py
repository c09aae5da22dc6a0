"""What `--lora` says: names of a library, or paths to adapters anywhere, each with a weight."""

from pathlib import Path
from typing import Any

from manylora.errors import AdapterNotFoundError, RequestError
from manylora.lora.convert import load_adapter
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture
from manylora.lora.names import UNFIT


def read_mixture(given: Any, library: Library) -> Mixture:
    """Return the mixture of ["lcm", "style:0.8", "other/file.safetensors:0.5"], or of what `Mixture.parse` reads.

    An adapter given by its path is added to the library, under the file's or folder's name.

    Raises:
        RequestError: a weight that is no finite number; one adapter twice.
        AdapterNotFoundError: no such name; in a list, no such path either.
        AdapterFormatError: the path holds no adapter that is read.
    """
    if not isinstance(given, list):
        mixture = Mixture.parse(given)
        for name in mixture.names:
            library.locate(name)
        return mixture
    return Mixture(tuple(_term(text, library) for text in given))


def _term(text: Any, library: Library) -> tuple[str, float]:
    if not isinstance(text, str) or not text:
        raise RequestError(f"a LoRA is given as NAME or NAME:WEIGHT, got {text!r}")
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return _name(text, library), 1.0
    try:
        weight = float(tail)
    except ValueError:
        raise RequestError(f"LoRA '{text}': '{tail}' after ':' is no number; write NAME:WEIGHT") from None
    return _name(head, library), weight


def _name(name_or_path: str, library: Library) -> str:
    """Return the name under which the library has it."""
    if name_or_path in library:
        return name_or_path
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _add(path, library)
    try:
        library.locate(name_or_path)
    except AdapterNotFoundError as error:
        raise AdapterNotFoundError(
            f"{error} There is no file or folder of that name either; name the folder that holds it with --adapters."
        ) from None
    return name_or_path


def _add(path: Path, library: Library) -> str:
    adapter = load_adapter(path)
    wanted = UNFIT.sub("_", adapter.name or path.stem).replace("/", "_").lstrip(".") or "lora"
    name, number = wanted, 1
    # The same content may be there under its name, say because its folder is a root.
    while name in library and library.load(name).identity != adapter.identity:
        number += 1
        name = f"{wanted}-{number}"
    if name not in library:
        library.add(name, adapter)
    return name
