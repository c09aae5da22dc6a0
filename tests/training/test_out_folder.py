import os
from pathlib import Path

import pytest

from manylora.errors import ConfigError
from manylora.training.out_folder import refuse_to_replace


def check(out: Path) -> None:
    refuse_to_replace(out, "adapter", marks=("config.json", "weights.bin"))


def test_what_may_be_replaced(tmp_path):
    check(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty")
    (tmp_path / "link").symlink_to("empty")
    check(tmp_path / "link")
    for mark in ("config.json", "weights.bin"):
        (tmp_path / mark[:3]).mkdir()
        (tmp_path / mark[:3] / mark).touch()
        (tmp_path / mark[:3] / "other").touch()
        check(tmp_path / mark[:3])


def test_anything_else_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("folder")
    for name in ("folder", "file", "link"):
        with pytest.raises(
            ConfigError, match=rf"out = .*{name} exists and is no adapter; .* Choose another"
        ):
            check(tmp_path / name)


@pytest.mark.parametrize("out", [".", "..", "/", "", "lora/.."])
def test_a_folder_without_a_name_of_its_own_is_refused(tmp_path, monkeypatch, out):
    """It would name the run's folder, and could not be replaced."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"has no name of its own.*for example .*lora"):
        check(Path(out))


def test_a_mount_point_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    assert os.path.ismount("/proc")
    for out in (Path("/proc"), tmp_path / "link"):
        with pytest.raises(ConfigError, match=r"is a mount point.*for example .*lora"):
            check(out)
