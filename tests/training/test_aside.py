import errno
import shutil
from pathlib import Path

import pytest

from manylora.training.aside import directory_aside, write_text_aside


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with directory_aside(target) as aside:
        (aside / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def write_half_then_fail(target):
    with directory_aside(target) as aside:
        (aside / "file").write_text("half")
        raise RuntimeError("disk full")


def test_an_error_leaves_the_old_folder_as_it_was(tmp_path):
    target = tmp_path / "target"
    with directory_aside(target) as aside:
        (aside / "file").write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_half_then_fail(target)
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "target"
    for name in ("first", "second"):
        with directory_aside(target) as aside:
            (aside / name).write_text("")
    assert [path.name for path in target.iterdir()] == ["second"]


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / "target").mkdir()
    for name in (".target.aside", ".target.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    with directory_aside(tmp_path / "target") as aside:
        (aside / "file").write_text("")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_kill_while_the_old_folder_is_deleted_leaves_a_whole_one(tmp_path, monkeypatch):
    def delete_one_file(folder, **_):
        for path in Path(folder).glob("*"):
            path.unlink()
            raise Killed

    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", delete_one_file)
        with pytest.raises(Killed), directory_aside(target) as aside:
            (aside / "file").write_text("new")
    assert (target / "file").read_text() == "new"


def test_where_the_new_folder_cannot_take_its_place_the_old_one_does(tmp_path, monkeypatch):
    target, rename = tmp_path / "target", Path.rename

    def refusing(path, to):
        if path.name.endswith(".aside"):
            raise OSError(errno.EIO, "input/output error")
        return rename(path, to)

    with directory_aside(target) as aside:
        (aside / "old").write_text("")
    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="input/output error"), directory_aside(target) as aside:
        (aside / "new").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["target", "target/old"]


def test_a_folder_that_cannot_be_moved_stays_as_it_was(tmp_path, monkeypatch):
    """As a mount point, which can be emptied but not renamed, nor renamed over."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    rename = Path.rename

    def refuse_mount_point(self, other):
        if target in (self, other):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse_mount_point)
    with pytest.raises(OSError, match="busy"), directory_aside(target) as aside:
        (aside / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_the_folder_that_it_leads_to_is_replaced(tmp_path, is_there):
    (tmp_path / "link").symlink_to("deep/target")
    if is_there:
        (tmp_path / "deep/target").mkdir(parents=True)
    for name in ("first", "second"):
        with directory_aside(tmp_path / "link") as aside:
            (aside / name).write_text("")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "deep/target").iterdir()] == ["second"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


def test_a_text_is_replaced(tmp_path):
    for text in ("old", "new"):
        write_text_aside(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1
