"""Copy the base and its LoRAs to where the repository ships them: python -m icons.ship. Half precision, with hashes.

Writes `model/` and `loras/` beside this file, and `shipped.json`: bytes and SHA-256 of every file. Refuses anything
that is not in half precision, and more than the repository may ship in all.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from icons.folders import RUNS_FOLDER
from manylora.errors import DataError
from manylora.training.aside import directory_aside, write_text_aside

HERE = Path(__file__).parent
LORAS = ("lcm", "paper-cut", "pixel-art", "fluent-emoji", "fluent-emoji-high-contrast")
MAX_BYTES = 40_000_000
"""Of all weights in the repository: this base, its LoRAs, and the adapters of the language model."""


def ship(pipeline: Path, loras: Path, names: Sequence[str], out: Path, max_bytes: int) -> dict[str, dict]:
    """Copy, and return bytes and SHA-256 by file.

    Raises:
        DataError: a file that is not in half precision, or more than `max_bytes` together.
    """
    sources = {out / "model": pipeline, **{out / "loras" / name: loras / name for name in names}}
    weights = [file for source in sources.values() for file in source.rglob("*.safetensors")]
    for file in weights:
        _refuse_unless_half(file)
    total = sum(file.stat().st_size for file in weights)
    if total > max_bytes:
        raise DataError(f"{total:,} bytes of weights, {max_bytes:,} may be shipped: leave some LoRAs out")
    for target, source in sources.items():
        with directory_aside(target) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)
    files = sorted(file for target in sources for file in target.rglob("*") if file.is_file())
    told = {
        str(file.relative_to(out)): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    write_text_aside(out / "shipped.json", json.dumps(told, indent=1) + "\n")
    return told


def _refuse_unless_half(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            dtype = file.get_slice(name).get_dtype()
            if dtype not in ("F16", "I64"):
                raise DataError(f"{path}: {name} is {dtype}, expected F16 (half precision)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, default=RUNS_FOLDER / "pipeline")
    parser.add_argument("--loras", type=Path, default=RUNS_FOLDER / "loras")
    parser.add_argument("--names", nargs="+", default=LORAS)
    options = parser.parse_args()
    adapters = HERE.parent / "adapters"
    left = MAX_BYTES - sum(file.stat().st_size for file in adapters.rglob("*.safetensors"))
    told = ship(options.pipeline, options.loras, options.names, HERE, left)
    print(f"{HERE}: {len(told)} files, {sum(file['bytes'] for file in told.values()):,} bytes")


if __name__ == "__main__":
    main()
