"""Small data sets of captioned pictures: coloured discs, in a folder or in tar files."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}


def disc(seed: int, size: int = 24) -> tuple[bytes, str]:
    """A PNG of a disc somewhere on white, and its caption."""
    rng = random.Random(seed)
    name = rng.choice(sorted(COLOURS))
    image = Image.new("RGB", (size, size), "white")
    x, y, radius = rng.uniform(8, 16), rng.uniform(8, 16), rng.uniform(5, 8)
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[name])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), f"a {name} disc"


def write_folder(folder: Path, pictures: Iterable[tuple[bytes, str]]) -> Path:
    """Write an image folder, one PNG a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (data, caption) in enumerate(pictures):
        (folder / f"{index:03d}.png").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{index:03d}.png", "text": caption, "kind": "disc"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a tar file of members by name."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
