"""Iconify's packages on npm: pinned, checked against their hash and licence, and read as SVG drawings.

Run as `python -m icons.icon_sets` to fetch the four sets that the base is trained on.
"""

import argparse
import base64
import hashlib
import json
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icons.folders import SETS_FOLDER
from icons.vocabulary import SUBJECTS, Subject
from manylora.errors import DataError
from manylora.training.aside import directory_aside


@dataclass(frozen=True)
class Package:
    """One npm package `@iconify-json/<name>`."""

    version: str
    sha512: str
    """Base64, as npm gives it after `sha512-`."""
    licence: str
    """SPDX name that its info.json must give."""


PACKAGES: Mapping[str, Package] = {
    "noto": Package(
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
    ),
    "noto-v1": Package(
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
    ),
    "fxemoji": Package(
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
    ),
    "fluent-emoji-flat": Package(
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
    ),
    "fluent-emoji-high-contrast": Package(
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
    ),
    "fluent-emoji": Package(
        "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
    ),
    "twemoji": Package(
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
    ),
    "openmoji": Package(
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
    ),
    "emojione": Package(
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
    ),
}

BASE_SETS = ("noto", "noto-v1", "fxemoji", "fluent-emoji-flat")
"""What the base learns from."""

STYLE_SETS = ("fluent-emoji-high-contrast", "fluent-emoji")
"""Looks that the base never sees, so that a LoRA can teach them."""


@dataclass(frozen=True)
class Drawing:
    """One icon as SVG, in its own units."""

    set_name: str
    icon: str
    body: str
    """The elements inside `<svg>`."""
    width: float
    height: float


def fetch(set_name: str, folder: Path = SETS_FOLDER) -> Path:
    """Download a package with npm, once; returns its folder, which appears whole or not at all.

    Raises:
        DataError: npm fails, or the package is not the one that was checked.
    """
    package = PACKAGES[set_name]
    target = folder / f"{set_name}-{package.version}"
    if target.is_dir():
        return target
    with directory_aside(target) as aside:
        archive = _npm_pack(set_name, package, aside)
        with tarfile.open(archive) as tar:
            for name in ("icons.json", "info.json"):
                (aside / name).write_bytes(_member(tar, f"package/{name}"))
        archive.unlink()
        check_licence(set_name, json.loads((aside / "info.json").read_text(encoding="utf-8")))
    return target


def check_licence(set_name: str, info: Mapping[str, Any]) -> None:
    """Raise DataError unless info.json names the licence that the set was chosen for."""
    licence, wanted = info["license"]["spdx"], PACKAGES[set_name].licence
    if licence != wanted:
        raise DataError(f"icon set {set_name!r}: info.json says licence {licence!r}, expected {wanted!r}")


def read_drawings(set_name: str, folder: Path = SETS_FOLDER) -> dict[str, Drawing]:
    """Return a fetched set's drawings by the name of their subject; subjects that it lacks are absent.

    Raises:
        DataError: the set has not been fetched, or lacks an icon that the vocabulary names for it.
    """
    path = folder / f"{set_name}-{PACKAGES[set_name].version}" / "icons.json"
    if not path.is_file():
        raise DataError(f"no icon set at {path}: run `python -m icons.icon_sets {set_name}` first")
    icon_set = json.loads(path.read_text(encoding="utf-8"))
    by_name = {subject.name: _drawing(set_name, icon_set, subject) for subject in SUBJECTS}
    return {name: drawing for name, drawing in by_name.items() if drawing is not None}


def _drawing(set_name: str, icon_set: Mapping[str, Any], subject: Subject) -> Drawing | None:
    icon = subject.icon_of(set_name)
    if icon is None:
        return None
    found = icon_set["icons"].get(icon)
    if found is None:
        if set_name in BASE_SETS:  # the vocabulary was checked against these; style sets may lack some
            raise DataError(f"icon set {set_name!r} has no icon {icon!r} for {subject.name!r}")
        return None
    width = found.get("width", icon_set.get("width", 16))
    height = found.get("height", icon_set.get("height", 16))
    return Drawing(set_name, icon, found["body"], width, height)


def _npm_pack(set_name: str, package: Package, folder: Path) -> Path:
    wanted = f"@iconify-json/{set_name}@{package.version}"
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(f"cannot fetch {wanted}: {error}. It needs npm and the npm registry.") from error
    archive = folder / done.stdout.strip().splitlines()[-1]
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise DataError(f"{wanted} has sha512 {digest}, expected {package.sha512}; it is not used")
    return archive


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise DataError(f"archive {tar.name} has no file {name}")
    return file.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=BASE_SETS, help=f"of {', '.join(PACKAGES)}")
    for set_name in parser.parse_args().sets:
        print(f"{set_name} ({PACKAGES[set_name].licence}): {fetch(set_name)}")


if __name__ == "__main__":
    main()
